"""HF PEFT's HRA: `hra_u` (in, r), one reflection for each column."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.extras import read_biases, read_saved
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.keys import pop_leaf
from graftwork.adapters.hf_peft.layerwise import (
    INDIFFERENT,
    TARGETS,
    Layer,
    check_shape,
    document,
    layers,
    stored_layers,
    the_one,
)
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import BadFile
from graftwork.reference.site import Site
from graftwork.techniques.hra import HRA

LEAF = "hra_u"
REFUSED = {"apply_GS": "reflections made orthogonal to one another are another technique; merge it first"}


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check((*TARGETS, "r"), INDIFFERENT, REFUSED)
    saved = read_saved(config, tensors, host)
    vectors = pop_leaf(tensors, LEAF)
    rank = config.get("r", int, 8)
    if rank < 2 or rank % 2:
        raise BadFile(f"{config.where}: r={rank}; graftwork's HRA has an even number of reflections")

    def layer(path: str, site: Site) -> Layer:
        check_shape(path, LEAF, vectors[path], (site.width_in, rank), config.where)
        return Layer((("rank", rank),), {"vectors": vectors[path].mT.contiguous()})

    parts = layers(HRA.name, config, host, vectors, layer)
    biases = read_biases(config.get("bias", str, "none"), tensors, host, config.where)
    return [*parts, *biases, *saved]


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    found = stored_layers(stored, HRA)
    own = {"r": the_one((technique.rank for technique, _, _ in found), "rank"), "apply_GS": False}
    config, saved = document("HRA", stored, (place for _, place, _ in found), own)
    return config, {f"{p.module}.{LEAF}": t["vectors"].mT.contiguous() for _, p, t in found} | saved
