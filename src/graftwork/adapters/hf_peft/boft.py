"""HF PEFT's BOFT: `boft_R` (factors, blocks, block, block), of which the skew-symmetric part counts, and `boft_s`
(out, 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graftwork.adapters.format import both_directions
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
from graftwork.techniques.boft import BOFT

ROTATIONS, GAINS = "boft_R", "boft_s"
UNDERSTOOD = (*TARGETS, "boft_block_size", "boft_block_num", "boft_n_butterfly_factor")


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, (*INDIFFERENT, "boft_dropout"))
    saved = read_saved(config, tensors, host)
    rotations, gains = pop_leaf(tensors, ROTATIONS), pop_leaf(tensors, GAINS)
    report = both_directions(rotations, gains)
    if report:
        raise BadFile(f"{config.where}: gains do not fit the rotations: {report}")

    def layer(path: str, site: Site) -> Layer:
        own, block = rotations[path], rotations[path].shape[-1]
        wanted = (len(own), site.width_in // block, block, block)
        check_shape(path, ROTATIONS, own, wanted, config.where)
        check_shape(path, GAINS, gains[path], (site.width_out, 1), config.where)
        rows, columns = torch.triu_indices(block, block, 1)
        skew = (0.5 * (own - own.mT))[..., rows, columns]
        options = (("block", block), ("butterflies", len(own)))
        return Layer(options, {"skew": skew, "gain": gains[path].reshape(-1)})

    parts = layers(BOFT.name, config, host, rotations, layer)
    biases = read_biases(config.get("bias", str, "none"), tensors, host, config.where)
    return [*parts, *biases, *saved]


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf). HF PEFT reads one factor only where its CUDA extension is missing."""
    found = stored_layers(stored, BOFT)
    if any(technique.terms is not None for technique, _, _ in found):
        raise BadFile("HF PEFT's BOFT has the exact rotation only; train with terms=None")
    block = the_one((technique.block for technique, _, _ in found), "block size")
    own = {
        "boft_block_size": block,
        "boft_block_num": 0,
        "boft_n_butterfly_factor": the_one((t.butterflies for t, _, _ in found), "number of factors"),
    }
    config, saved = document("BOFT", stored, (place for _, place, _ in found), own)
    tensors = {f"{p.module}.{ROTATIONS}": _square(t["skew"], block) for _, p, t in found}
    return config, tensors | {f"{p.module}.{GAINS}": t["gain"].unsqueeze(1) for _, p, t in found} | saved


def _square(upper: Tensor, block: int) -> Tensor:
    rows, columns = torch.triu_indices(block, block, 1)
    half = upper.new_zeros(*upper.shape[:-1], block, block)
    half[..., rows, columns] = upper
    return half - half.mT
