"""HF PEFT's HRA: `hra_u` (in, r), one reflection for each column."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.layerwise import (
    INDIFFERENT,
    TARGETS,
    Layer,
    check_linear,
    check_shapes,
    document,
    layers_of,
    read_layers,
    the_one,
)
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import BadFile
from graftwork.reference.site import Site
from graftwork.techniques.hra import HRA

LEAF = "hra_u"
UNDERSTOOD = (*TARGETS, "r", "bias")
REFUSED = {"apply_GS": "reflections made orthogonal to one another are another technique; merge it first"}


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT, REFUSED)
    rank = config.get("r", int, 8)
    if rank < 2 or rank % 2:
        raise BadFile(f"{config.where}: r={rank}; graftwork's HRA has an even number of reflections")

    def layer(site: Site, own: dict[str, Tensor]) -> Layer:
        check_linear(site, config.where)
        check_shapes(site, own, {LEAF: (site.width_in, rank)}, config.where)
        return Layer(HRA(rank=rank), {"vectors": own[LEAF].mT.contiguous()})

    return read_layers(config, tensors, host, {LEAF: LEAF}, layer)


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    found = layers_of(stored, HRA)
    rank = the_one((own.technique.rank for own in found), "rank")
    fields = {"r": rank, "apply_GS": False, "bias": "none"}
    config, saved = document("HRA", stored, (own.path for own in found), fields)
    return config, {f"{own.path}.{LEAF}": own.tensors["vectors"].mT.contiguous() for own in found} | saved
