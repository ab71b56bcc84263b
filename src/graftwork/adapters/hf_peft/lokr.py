"""HF PEFT's LOKR: `lokr_w1` (o1, i1), and `lokr_w2` (o2, i2) or its factors `lokr_w2_a` and `lokr_w2_b`, per module."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.matrices import PLACES, SIZES, common, of_kind, only, read_matrices, sizes
from graftwork.adapters.manifest import Place
from graftwork.adapters.stored import StoredAdapter
from graftwork.reference.technique import Layers
from graftwork.techniques.lokr import LoKr

LEAVES = {"lokr_w1": "left", "lokr_w2": "right.0", "lokr_w2_a": "right.0", "lokr_w2_b": "right.1"}
UNDERSTOOD = (*PLACES, *SIZES, "decompose_factor")
INDIFFERENT = ("init_weights", "rank_dropout", "rank_dropout_scale", "module_dropout")
REFUSED = {
    "use_effective_conv2d": "factored kernels are not read; merge the adapter first",
    "decompose_both": "the left factor is kept whole here; merge the adapter first",
}


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT, REFUSED)
    factor = int(config.number("decompose_factor", -1))
    make = partial(_technique, None if factor == -1 else factor)
    return read_matrices(config, tensors, host, LEAVES, make, rank=8)


def _technique(
    factor: int | None, rank: int, alpha: float, workspaces: tuple[str, ...], layers: Layers
) -> LoKr:
    scale = None if alpha == rank else alpha
    return LoKr(rank=rank, alpha=scale, factor=factor, workspaces=workspaces, layers=layers)


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    found = of_kind(stored, LoKr)
    config, saved = common(stored, "LOKR", found)
    factor = only((t.factor for t, _, _ in found.values()), "decompose_factor")
    config |= sizes({path: (t.rank, t.scale * t.rank) for path, (t, _, _) in found.items()})
    tensors: dict[str, Tensor] = {}
    for path, (_, place, own) in found.items():
        tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in _leaves(place, own).items()}
    return config | {"decompose_factor": -1 if factor is None else factor}, tensors | saved


def _leaves(place: Place, own: dict[str, Tensor]) -> dict[str, Tensor]:
    if "right.1" in own:
        return {"lokr_w1": own["left"], "lokr_w2_a": own["right.0"], "lokr_w2_b": own["right.1"]}
    right = own["right.0"]
    return {
        "lokr_w1": own["left"],
        "lokr_w2": right.reshape(len(right), -1, *place.kernel) if place.kernel else right,
    }
