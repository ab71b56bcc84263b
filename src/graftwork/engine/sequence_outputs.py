"""What a stack answers, without the slots.

B samples, T own positions, S = n + T positions, C channels
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graftwork.engine.sequence_layout import Layout

_MAPS = ("attentions", "decoder_attentions", "cross_attentions")


def stripped(out: Any, layout: Layout, total: int) -> Any:
    """A prefill's answer: every tensor or tuple of tensors over S positions with T of them left."""
    for name in list(out.keys()):
        if name in _MAPS:
            out[name] = _each(out[name], lambda map_, name=name: _map(map_, layout, total, name))
        elif name == "router_logits":
            out[name] = _each(out[name], lambda flat: _flat(flat, layout, total))
        else:
            out[name] = _each(out[name], lambda value: signal(value, layout, total))
    return out


def stripped_maps(out: Any, layout: Layout) -> Any:
    """A decoding step's answer: attention maps (B, H, Q, S) without the slots' columns."""
    maps = out.get("attentions")
    if maps is not None:
        out["attentions"] = _each(maps, lambda map_: layout.take(map_, 3))
    return out


def signal(value: Any, layout: Layout, total: int) -> Any:
    """A signal (B, S, ...) without the slots; anything else as it is."""
    if not isinstance(value, Tensor) or tuple(value.shape[:2]) != (len(layout.start), total):
        return value
    return layout.take(value)


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(part if part is None else change(part) for part in value)
    return value if value is None else change(value)


def _map(value: Tensor, layout: Layout, total: int, name: str) -> Tensor:
    rows = layout.take(value, 2) if value.shape[2] == total else value
    return layout.take(rows, 3) if value.shape[3] >= total and name != "cross_attentions" else rows


def _flat(value: Tensor, layout: Layout, total: int) -> Tensor:
    """(B S, experts) -> (B T, experts)."""
    return layout.take(value.unflatten(0, (len(layout.start), total))).flatten(0, 1)
