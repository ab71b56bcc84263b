"""HF PEFT's RANDLORA: `randlora_lambda` (r, n) and `randlora_gamma` (n, smaller side) per module. The frozen bases
are written by their seed alone: HF PEFT would have them once more for every module.
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
from graftwork.techniques.randlora import RandLoRA

LEAVES = {"randlora_lambda": "weights", "randlora_gamma": "gains"}
FROZEN = {"randlora_A": "inner", "randlora_B": "outer"}
UNDERSTOOD = (*TARGETS, "r", "randlora_alpha", "bias", "projection_prng_key", "save_projection")
INDIFFERENT = ("fan_in_fan_out", "init_weights", "randlora_dropout")
REFUSED = dict.fromkeys(("sparse", "very_sparse"), "sparse bases are not drawn here; merge it first")


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT, REFUSED)
    technique = RandLoRA(
        rank=config.get("r", int, 32),
        alpha=config.number("randlora_alpha", 640),
        seed=config.get("projection_prng_key", int, 0),
    )
    given = take_frozen(tensors, FROZEN)

    def layer(site: Site, own: dict[str, Tensor]) -> Layer:
        return Layer(technique, own)

    parts = read_layers(config, tensors, host, LEAVES, layer)
    compare_frozen(parts, RandLoRA, technique.frozen, given, f"{config.where}: seed {technique.seed}")
    return parts


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    found = layers_of(stored, RandLoRA, transposed=True)
    kinds = ((own.technique.rank, own.technique.scale, own.technique.seed) for own in found)
    rank, scale, seed = the_one(kinds, "rank, scale and seed")
    fields = {
        "r": rank,
        "randlora_alpha": scale * rank,
        "bias": "none",
        "projection_prng_key": seed,
        "save_projection": False,
        "sparse": False,
        "very_sparse": False,
        "fan_in_fan_out": all(is_transposed(own.place) for own in found),
    }
    one_width(found)
    config, saved = document("RANDLORA", stored, (own.path for own in found), fields)
    return config, named(found, LEAVES) | saved
