"""HF PEFT's MISS: `miss_block` (r, out) per module."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.matrices import PLACES, common, of_kind, only, read_matrices
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import BadFile
from graftwork.reference.technique import Layers
from graftwork.techniques.miss import MiSS

LEAVES = {"miss_block": "block"}
UNDERSTOOD = (*PLACES, "r", "bias", "init_weights")
INDIFFERENT = ("mini_r", "miss_dropout")


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT)
    if config.document.get("init_weights") in ("bat", "mini"):
        variant = config.document["init_weights"]
        raise BadFile(
            f"{config.where}: init_weights={variant!r} is another parametrisation, which is not read"
        )
    if config.get("bias", str, "none") != "none":
        raise BadFile(f"{config.where}: biases are read beside LORA only")
    return read_matrices(config, tensors, host, LEAVES, _technique, rank=64)


def _technique(rank: int, alpha: float, workspaces: tuple[str, ...], layers: Layers) -> MiSS:
    return MiSS(rank=rank, workspaces=workspaces, layers=layers)


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    found = of_kind(stored, MiSS)
    if any(place.kernel for _, place, _ in found.values()):
        raise BadFile("HF PEFT's MiSS takes linear layers only")
    config, saved = common(stored, "MISS", found)
    config["r"] = only((technique.rank for technique, _, _ in found.values()), "r")
    return config, {f"{path}.miss_block": own["block"] for path, (_, _, own) in found.items()} | saved
