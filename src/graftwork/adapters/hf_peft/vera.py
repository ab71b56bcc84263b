"""HF PEFT's VERA: `vera_lambda_d` (r,) and `vera_lambda_b` (out,) per module; the frozen matrices by their seed.

A file may hold the matrices besides (`vera_A`, `vera_B`): they must be those that the seed gives here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.extras import is_transposed
from graftwork.adapters.hf_peft.frozen import compare_frozen, one_width, take_frozen
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.layerwise import (
    TARGETS,
    Layer,
    document,
    layers_of,
    named,
    read_layers,
    the_one,
)
from graftwork.adapters.stored import StoredAdapter
from graftwork.reference.site import Site
from graftwork.techniques.vera import VeRA

LEAVES = {"vera_lambda_d": "inner", "vera_lambda_b": "outer"}
FROZEN = {"vera_A": "down", "vera_B": "up"}
UNDERSTOOD = (*TARGETS, "r", "bias", "projection_prng_key", "save_projection")
INDIFFERENT = ("fan_in_fan_out", "d_initial", "init_weights", "vera_dropout")


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT)
    technique = VeRA(rank=config.get("r", int, 256), seed=config.get("projection_prng_key", int, 0))
    given = take_frozen(tensors, FROZEN)

    def layer(site: Site, own: dict[str, Tensor]) -> Layer:
        return Layer(technique, own)

    parts = read_layers(config, tensors, host, LEAVES, layer)
    compare_frozen(parts, VeRA, technique.frozen, given, f"{config.where}: seed {technique.seed}")
    return parts


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    found = layers_of(stored, VeRA, transposed=True)
    rank, seed = the_one(((own.technique.rank, own.technique.seed) for own in found), "rank and seed")
    fields = {
        "r": rank,
        "bias": "none",
        "projection_prng_key": seed,
        "save_projection": True,
        "fan_in_fan_out": all(is_transposed(own.place) for own in found),
    }
    config, saved = document("VERA", stored, (own.path for own in found), fields)
    drawn = found[0].technique.frozen(*one_width(found))
    return config, named(found, LEAVES) | {name: drawn[own] for name, own in FROZEN.items()} | saved
