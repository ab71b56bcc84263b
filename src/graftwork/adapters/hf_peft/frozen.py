"""Frozen random matrices that all modules of HF PEFT's VERA and RANDLORA share. Files of both libraries may say their
seed alone; where they hold the matrices too, these must be the ones that the seed gives here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from graftwork.adapters.hf_peft.host import Part
from graftwork.adapters.hf_peft.keys import PROMPTS, pop_leaf
from graftwork.adapters.hf_peft.layerwise import T, Written, the_one
from graftwork.adapters.manifest import Place
from graftwork.errors import BadFile
from graftwork.reference.site import Site
from graftwork.reference.technique import Technique

Draw = Callable[[int, int], Mapping[str, Tensor]]


def take_frozen(tensors: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Take the matrices out of `tensors`, at the front and beside each module, by their names here."""
    given = {
        own: tensors.pop(f"{PROMPTS}{name}") for name, own in names.items() if f"{PROMPTS}{name}" in tensors
    }
    for name in names:
        pop_leaf(tensors, name)
    return given


def compare_frozen(
    parts: Sequence[Part], kind: type[Technique], draw: Draw, given: Mapping[str, Tensor], where: str
) -> None:
    """BadFile where the matrices of the file are not those that are drawn for these techniques."""
    wide = [widest(part.sites) for part in parts if isinstance(part.technique, kind)]
    drawn = draw(*the_one(wide, "pair of frozen matrices")) if wide else {}
    for name, tensor in given.items():
        here = drawn.get(name, tensor.new_empty(0)).to(tensor.dtype)
        if here.numel() != tensor.numel() or not torch.allclose(here.view(tensor.shape), tensor, atol=1e-2):
            raise BadFile(
                f"{where} gives other frozen matrices here than those in the file, with which it was trained; merge "
                "the adapter first"
            )


def widest(sites: Iterable[Site | Place]) -> tuple[int, int]:
    """Widths (in, out) that take each of these."""
    widths = [(site.width_in, site.width_out) for site in sites]
    return max(own for own, _ in widths), max(own for _, own in widths)


def one_width(found: Sequence[Written[T]]) -> tuple[int, int]:
    """Widths that the matrices are drawn at. BadFile where techniques of the adapter have different ones."""
    techniques = list(dict.fromkeys(own.technique for own in found))
    groups = ([own.place for own in found if own.technique == one] for one in techniques)
    return the_one((widest(places) for places in groups), "pair of frozen matrices")
