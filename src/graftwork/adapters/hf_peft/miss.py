"""HF PEFT's MISS: `miss_block` (r, out) per module."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
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
from graftwork.errors import BadFile
from graftwork.reference.site import Site
from graftwork.techniques.miss import MiSS

LEAVES = {"miss_block": "block"}
UNDERSTOOD = (*TARGETS, "r", "bias", "init_weights")
INDIFFERENT = ("mini_r", "miss_dropout")


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT)
    if config.document.get("init_weights") in ("bat", "mini"):
        variant = config.document["init_weights"]
        raise BadFile(
            f"{config.where}: init_weights={variant!r} is another parametrisation, which is not read"
        )
    rank = config.get("r", int, 64)

    def layer(site: Site, own: dict[str, Tensor]) -> Layer:
        return Layer(MiSS(rank=rank), own)

    return read_layers(config, tensors, host, LEAVES, layer)


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    found = layers_of(stored, MiSS)
    fields = {"r": the_one((own.technique.rank for own in found), "rank"), "bias": "none"}
    config, saved = document("MISS", stored, (own.path for own in found), fields)
    return config, named(found, LEAVES) | saved
