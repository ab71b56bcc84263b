"""HF PEFT's LOKR: `lokr_w1` (o1, i1), and `lokr_w2` (o2, i2) or its factors `lokr_w2_a` and `lokr_w2_b`, per module."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.layerwise import (
    SIZES,
    TARGETS,
    Layer,
    Written,
    document,
    layers_of,
    read_layers,
    size_of,
    sizes,
    the_one,
)
from graftwork.adapters.stored import StoredAdapter
from graftwork.reference.site import Site
from graftwork.techniques.lokr import LoKr

LEAVES = {"lokr_w1": "left", "lokr_w2": "right.0", "lokr_w2_a": "right.0", "lokr_w2_b": "right.1"}
UNDERSTOOD = (*TARGETS, *SIZES, "decompose_factor")
INDIFFERENT = ("init_weights", "rank_dropout", "rank_dropout_scale", "module_dropout")
REFUSED = {
    "use_effective_conv2d": "factored kernels are not read; merge the adapter first",
    "decompose_both": "the left factor is kept whole here; merge the adapter first",
}


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT, REFUSED)
    given = int(config.number("decompose_factor", -1))
    factor = None if given == -1 else given

    def layer(site: Site, own: dict[str, Tensor]) -> Layer:
        rank, alpha = size_of(config, site.module, 8)
        technique = LoKr(rank=rank, alpha=None if alpha == rank else alpha, factor=factor)
        return Layer(technique, {name: t.flatten(1) for name, t in own.items()})

    return read_layers(config, tensors, host, LEAVES, layer)


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    found = layers_of(stored, LoKr, kernels=True)
    factor = the_one((own.technique.factor for own in found), "decompose_factor")
    options = {own.path: (own.technique.rank, own.technique.scale * own.technique.rank) for own in found}
    fields = {**sizes(options), "decompose_factor": -1 if factor is None else factor}
    config, saved = document("LOKR", stored, options, fields)
    return config, {f"{own.path}.{leaf}": t for own in found for leaf, t in _leaves(own).items()} | saved


def _leaves(layer: Written[LoKr]) -> dict[str, Tensor]:
    own, kernel = layer.tensors, layer.place.kernel
    if "right.1" in own:
        return {"lokr_w1": own["left"], "lokr_w2_a": own["right.0"], "lokr_w2_b": own["right.1"]}
    right = own["right.0"]
    return {"lokr_w1": own["left"], "lokr_w2": right.reshape(len(right), -1, *kernel) if kernel else right}
