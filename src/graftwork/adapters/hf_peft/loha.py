"""HF PEFT's LOHA: `hada_w1_a`, `hada_w2_a` (out, r) and `hada_w1_b`, `hada_w2_b` (r, in) per module."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.layerwise import (
    SIZES,
    TARGETS,
    Layer,
    document,
    layers_of,
    named,
    read_layers,
    size_of,
    sizes,
)
from graftwork.adapters.stored import StoredAdapter
from graftwork.reference.site import Site
from graftwork.techniques.loha import LoHa

LEAVES = {"hada_w1_a": "up1", "hada_w1_b": "down1", "hada_w2_a": "up2", "hada_w2_b": "down2"}
UNDERSTOOD = (*TARGETS, *SIZES)
INDIFFERENT = ("init_weights", "rank_dropout", "module_dropout")
REFUSED = {"use_effective_conv2d": "factored kernels are not read; merge the adapter first"}


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT, REFUSED)

    def layer(site: Site, own: dict[str, Tensor]) -> Layer:
        rank, alpha = size_of(config, site.module, 8)
        technique = LoHa(rank=rank, alpha=None if alpha == rank else alpha)
        return Layer(technique, {name: t.flatten(1) for name, t in own.items()})

    return read_layers(config, tensors, host, LEAVES, layer)


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    found = layers_of(stored, LoHa, kernels=True)
    options = {own.path: (own.technique.rank, own.technique.scale * own.technique.rank) for own in found}
    config, saved = document("LOHA", stored, options, sizes(options))
    return config, named(found, LEAVES) | saved
