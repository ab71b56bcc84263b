"""HF PEFT's VERA: `vera_lambda_d` (r,) and `vera_lambda_b` (out,) per module; the frozen matrices by their seed.

A file may hold the matrices besides (`vera_A`, `vera_B`): they must be those that the seed gives here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.keys import FROZEN, PROMPTS
from graftwork.adapters.hf_peft.matrices import PLACES, common, of_kind, only, read_matrices, transposed
from graftwork.adapters.manifest import Place
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import BadFile
from graftwork.reference.technique import Layers
from graftwork.techniques.vera import VeRA

LEAVES = {"vera_lambda_d": "inner", "vera_lambda_b": "outer"}
UNDERSTOOD = (*PLACES, "r", "bias", "projection_prng_key", "save_projection")
INDIFFERENT = ("fan_in_fan_out", "d_initial", "init_weights", "vera_dropout")


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT)
    if config.get("bias", str, "none") != "none":
        raise BadFile(f"{config.where}: biases are read beside LORA only")
    seed = int(config.number("projection_prng_key", 0))
    names = {f"{PROMPTS}{name}": own for name, own in FROZEN.items()}
    given = {own: tensors.pop(name) for name, own in names.items() if name in tensors}
    parts = read_matrices(config, tensors, host, LEAVES, partial(_technique, seed), rank=256)
    own = [(part.technique, part.sites) for part in parts if isinstance(part.technique, VeRA)]
    widest = [(max(s.width_in for s in sites), max(s.width_out for s in sites)) for _, sites in own]
    if own:
        only(widest, "pair of frozen matrices")
        _compare(own[0][0].frozen(*widest[0]), given, f"{config.where}: seed {seed}")
    return parts


def _compare(drawn: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in given.items():
        here = drawn[name]
        if here.shape != tensor.shape or not torch.allclose(here, tensor.float(), atol=1e-3):
            raise BadFile(
                f"{where} gives other frozen matrices here than those in the file, with which it was trained; merge "
                "the adapter first"
            )


def _technique(seed: int, rank: int, alpha: float, workspaces: tuple[str, ...], layers: Layers) -> VeRA:
    return VeRA(rank=rank, seed=seed, workspaces=workspaces, layers=layers)


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    found = of_kind(stored, VeRA)
    if any(place.kernel for _, place, _ in found.values()):
        raise BadFile("HF PEFT's VeRA takes linear layers only")
    config, saved = common(stored, "VERA", found)
    rank, seed = only(((t.rank, t.seed) for t, _, _ in found.values()), "r and projection_prng_key")
    widest = only(
        (_widest(found, technique) for technique, _, _ in found.values()), "pair of frozen matrices"
    )
    drawn = next(technique for technique, _, _ in found.values()).frozen(*widest)
    config |= {
        "r": rank,
        "projection_prng_key": seed,
        "save_projection": True,
        "fan_in_fan_out": transposed(place for _, place, _ in found.values()),
    }
    tensors = {f"{p}.{leaf}": own[name] for p, (_, _, own) in found.items() for leaf, name in LEAVES.items()}
    return config, tensors | {name: drawn[own] for name, own in FROZEN.items()} | saved


def _widest(found: Mapping[str, tuple[VeRA, Place, dict[str, Tensor]]], technique: VeRA) -> tuple[int, int]:
    """Widths that one technique's frozen matrices are drawn at."""
    own = [(place.width_in, len(tensors["outer"])) for t, place, tensors in found.values() if t is technique]
    return max(width for width, _ in own), max(width for _, width in own)
