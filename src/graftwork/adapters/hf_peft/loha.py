"""HF PEFT's LOHA: `hada_w1_a`, `hada_w2_a` (out, r) and `hada_w1_b`, `hada_w2_b` (r, in) per module."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.matrices import PLACES, SIZES, common, of_kind, read_matrices, sizes
from graftwork.adapters.stored import StoredAdapter
from graftwork.reference.technique import Layers
from graftwork.techniques.loha import LoHa

LEAVES = {"hada_w1_a": "up1", "hada_w1_b": "down1", "hada_w2_a": "up2", "hada_w2_b": "down2"}
UNDERSTOOD = (*PLACES, *SIZES)
INDIFFERENT = ("init_weights", "rank_dropout", "module_dropout")
REFUSED = {"use_effective_conv2d": "factored kernels are not read; merge the adapter first"}


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT, REFUSED)
    return read_matrices(config, tensors, host, LEAVES, _technique, rank=8)


def _technique(rank: int, alpha: float, workspaces: tuple[str, ...], layers: Layers) -> LoHa:
    return LoHa(rank=rank, alpha=None if alpha == rank else alpha, workspaces=workspaces, layers=layers)


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    found = of_kind(stored, LoHa)
    config, saved = common(stored, "LOHA", found)
    tensors = {
        f"{path}.{leaf}": own[name] for path, (_, _, own) in found.items() for leaf, name in LEAVES.items()
    }
    return config | sizes(
        {path: (t.rank, t.scale * t.rank) for path, (t, _, _) in found.items()}
    ), tensors | saved
