"""HF PEFT's BOFT: `boft_R` (factors, blocks, block, block), of which the skew-symmetric part counts, and `boft_s`
(out, 1).
"""

from __future__ import annotations

from typing import Any

import torch
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
from graftwork.techniques.boft import BOFT

ROTATIONS, GAINS = "boft_R", "boft_s"
UNDERSTOOD = (*TARGETS, "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "bias")


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, (*INDIFFERENT, "boft_dropout"))

    def layer(site: Site, own: dict[str, Tensor]) -> Layer:
        check_linear(site, config.where)
        count, block = _sizes(site, own, config.where)
        wanted = {ROTATIONS: (count, site.width_in // block, block, block), GAINS: (site.width_out, 1)}
        check_shapes(site, own, wanted, config.where)
        rows, columns = torch.triu_indices(block, block, 1)
        skew = (0.5 * (own[ROTATIONS] - own[ROTATIONS].mT))[..., rows, columns]
        return Layer(BOFT(block=block, butterflies=count), {"skew": skew, "gain": own[GAINS].reshape(-1)})

    return read_layers(config, tensors, host, {name: name for name in (ROTATIONS, GAINS)}, layer)


def _sizes(site: Site, own: dict[str, Tensor], where: str) -> tuple[int, int]:
    """(factors, block)."""
    if ROTATIONS not in own or own[ROTATIONS].dim() != 4:
        raise BadFile(f"{where}: {site.module} has no {ROTATIONS} (factors, blocks, block, block)")
    return len(own[ROTATIONS]), own[ROTATIONS].shape[-1]


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf). HF PEFT reads one factor only where its CUDA extension is missing."""
    found = layers_of(stored, BOFT)
    if any(own.technique.terms is not None for own in found):
        raise BadFile("HF PEFT's BOFT has the exact rotation only; train with terms=None")
    block = the_one((own.technique.block for own in found), "block size")
    fields = {
        "boft_block_size": block,
        "boft_block_num": 0,
        "boft_n_butterfly_factor": the_one((own.technique.butterflies for own in found), "number of factors"),
        "bias": "none",
    }
    config, saved = document("BOFT", stored, (own.path for own in found), fields)
    tensors = {f"{own.path}.{ROTATIONS}": _square(own.tensors["skew"], block) for own in found}
    gains = {f"{own.path}.{GAINS}": own.tensors["gain"].unsqueeze(1) for own in found}
    return config, tensors | gains | saved


def _square(upper: Tensor, block: int) -> Tensor:
    rows, columns = torch.triu_indices(block, block, 1)
    half = upper.new_zeros(*upper.shape[:-1], block, block)
    half[..., rows, columns] = upper
    return half - half.mT
