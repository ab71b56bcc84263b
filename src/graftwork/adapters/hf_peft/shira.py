"""HF PEFT's SHIRA: `shira_weight` (n,), and `shira_indices` (2, n), rows and columns of the values, per module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.layerwise import (
    TARGETS,
    Layer,
    Written,
    check_linear,
    check_shapes,
    document,
    layers_of,
    named,
    read_layers,
    the_one,
)
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import BadFile
from graftwork.reference.site import Site
from graftwork.techniques.shira import SHiRA

LEAVES = {"shira_weight": "values"}
INDICES = "shira_indices"
UNDERSTOOD = (*TARGETS, "r", "random_seed", "mask_type")
UNSEEDED = torch.Generator("cpu").initial_seed()  # what HF PEFT draws from without a seed


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, ("fan_in_fan_out", "init_weights"))
    technique = SHiRA(rank=config.get("r", int, 32), seed=config.get("random_seed", int, UNSEEDED))

    def layer(site: Site, own: dict[str, Tensor]) -> Layer:
        check_linear(site, config.where)
        count = technique.count(site)
        check_shapes(site, own, {"values": (count,), INDICES: (2, count)}, config.where)
        rows, columns = own[INDICES].long()
        if not torch.equal(rows * site.width_in + columns, technique.places(site)):
            raise BadFile(
                f"{config.where}: {site.module} trains other values than the random ones of seed {technique.seed}; "
                "masks of one's own are not read, merge the adapter first"
            )
        return Layer(technique, {"values": own["values"]})

    return read_layers(config, tensors, host, {**LEAVES, INDICES: INDICES}, layer)


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    found = layers_of(stored, SHiRA)
    rank, seed = the_one(((own.technique.rank, own.technique.seed) for own in found), "rank and seed")
    fields = {"r": rank, "random_seed": seed, "mask_type": "random"}
    config, saved = document("SHIRA", stored, (own.path for own in found), fields)
    return config, named(found, LEAVES) | {f"{own.path}.{INDICES}": _indices(own) for own in found} | saved


def _indices(own: Written[SHiRA]) -> Tensor:
    width = own.place.width_in
    places = own.technique.drawn(width, len(own.tensors["values"]) // own.technique.rank - width)
    return torch.stack((places // width, places % width)).int()
