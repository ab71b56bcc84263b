"""HF PEFT's VERA: `vera_lambda_d` (r,) and `vera_lambda_b` (out,) per module; the frozen matrices by their seed.

A file may hold the matrices besides (`vera_A`, `vera_B`): they must be those that the seed gives here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.extras import is_transposed
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.keys import FROZEN, PROMPTS
from graftwork.adapters.hf_peft.layerwise import (
    TARGETS,
    Layer,
    Written,
    document,
    layers_of,
    named,
    read_layers,
    the_one,
)
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import BadFile
from graftwork.reference.site import Site
from graftwork.techniques.vera import VeRA

LEAVES = {"vera_lambda_d": "inner", "vera_lambda_b": "outer"}
UNDERSTOOD = (*TARGETS, "r", "bias", "projection_prng_key", "save_projection")
INDIFFERENT = ("fan_in_fan_out", "d_initial", "init_weights", "vera_dropout")


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT)
    technique = VeRA(rank=config.get("r", int, 256), seed=config.get("projection_prng_key", int, 0))
    names = {f"{PROMPTS}{name}": own for name, own in FROZEN.items()}
    given = {own: tensors.pop(name) for name, own in names.items() if name in tensors}

    def layer(site: Site, own: dict[str, Tensor]) -> Layer:
        return Layer(technique, own)

    parts = read_layers(config, tensors, host, LEAVES, layer)
    widest = [
        (max(site.width_in for site in part.sites), max(site.width_out for site in part.sites))
        for part in parts
        if isinstance(part.technique, VeRA)
    ]
    if widest:
        drawn = technique.frozen(*the_one(widest, "pair of frozen matrices"))
        _compare(drawn, given, f"{config.where}: seed {technique.seed}")
    return parts


def _compare(drawn: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in given.items():
        here = drawn[name]
        if here.shape != tensor.shape or not torch.allclose(here, tensor.float(), atol=1e-3):
            raise BadFile(
                f"{where} gives other frozen matrices here than those in the file, with which it was trained; merge "
                "the adapter first"
            )


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    found = layers_of(stored, VeRA, transposed=True)
    rank, seed = the_one(((own.technique.rank, own.technique.seed) for own in found), "rank and seed")
    widest = the_one((_widest(found, own.technique) for own in found), "pair of frozen matrices")
    fields = {
        "r": rank,
        "bias": "none",
        "projection_prng_key": seed,
        "save_projection": True,
        "fan_in_fan_out": all(is_transposed(own.place) for own in found),
    }
    config, saved = document("VERA", stored, (own.path for own in found), fields)
    drawn = found[0].technique.frozen(*widest)
    return config, named(found, LEAVES) | {name: drawn[own] for name, own in FROZEN.items()} | saved


def _widest(found: Iterable[Written[VeRA]], technique: VeRA) -> tuple[int, int]:
    """Widths that one technique's frozen matrices are drawn at."""
    own = [(own.place.width_in, len(own.tensors["outer"])) for own in found if own.technique is technique]
    return max(width for width, _ in own), max(width for _, width in own)
