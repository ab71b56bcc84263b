"""The channels that one workspace owns in a fused projection: (start, stop), or for layouts that go head by head
(heads, parts, part, head_dim)."""

from __future__ import annotations

import torch
from torch import Tensor


def out_axis(matrix: Tensor) -> int:
    """The axis of output channels of a matrix (..., O, I), or of a vector (O,)."""
    return -1 if matrix.dim() == 1 else -2


def take(signal: Tensor, own: tuple[int, ...], axis: int) -> Tensor:
    """The owned channels of `signal` along `axis`."""
    if len(own) == 2:
        return signal.narrow(axis, own[0], own[1] - own[0])
    heads, parts, part, width = own
    axis = axis % signal.dim()
    return signal.unflatten(axis, (heads, parts, width)).select(axis + 1, part).flatten(axis, axis + 1)


def put(signal: Tensor, value: Tensor, own: tuple[int, ...], axis: int) -> Tensor:
    """`signal` with its owned channels replaced by `value` (a new tensor)."""
    value = value.to(signal.dtype)
    if len(own) == 2:
        return torch.slice_scatter(signal, value, axis % signal.dim(), own[0], own[1])
    heads, parts, part, width = own
    axis = axis % signal.dim()
    shaped = signal.unflatten(axis, (heads, parts, width))
    mine = value.unflatten(axis, (heads, width))
    return torch.select_scatter(shaped, mine, axis + 1, part).flatten(axis, axis + 2)


def widen(rows: Tensor, own: tuple[int, ...] | None, total: int) -> Tensor:
    """Rows (O', R) of the owned channels laid into zeros (total, R)."""
    if own is None:
        return rows
    return put(rows.new_zeros(total, rows.shape[-1]), rows, own, -2)
