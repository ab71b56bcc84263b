"""Rescaling an answer channel by channel, kept for backward by its result.

    out = c (y - b) + b

The gradient of c reads y - b = (out - b) / c, and `out` is what the next operation of the host keeps anyhow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from graftwork.engine.lowrank import any_tracked, outside_autocast, traced

_RUN = 64


def rescaled(y: Tensor, factor: Tensor, bias: Tensor | None, *, in_place: bool = False) -> Tensor:
    """c (y - b) + b for an answer y (..., O), c = `factor` (O,) and b = `bias` (O,).

    A channel whose factor is exactly 0 gets no gradient for it. `in_place` allows to overwrite y, which nobody else
    reads; it is not done to a view, which autograd forbids for the answer of a function of ours.
    """
    if traced():
        centred = y if bias is None else y - bias.to(y.dtype)
        scaled = centred * factor.to(y.dtype)
        return scaled if bias is None else scaled + bias.to(y.dtype)
    if not (torch.is_grad_enabled() and any_tracked(y, factor)):
        return _product(y, factor, bias, in_place)
    answer: Tensor = _Rescaled.apply(y, factor, bias, in_place and not y._is_view())
    return answer


def _product(y: Tensor, factor: Tensor, bias: Tensor | None, in_place: bool) -> Tensor:
    out = y.mul_(factor.to(y.dtype)) if in_place else y * factor.to(y.dtype)
    return out if bias is None else out.add_(((1 - factor) * bias).to(y.dtype))


class _Rescaled(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, factor: Tensor, bias: Tensor | None, in_place: bool) -> Tensor:
        out = _product(y, factor, bias, in_place)
        if in_place:
            ctx.mark_dirty(y)
        ctx.save_for_backward(out, factor, bias)
        return out

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        out, factor, bias = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return dy * factor.to(dy.dtype), None, None, None
        flat = dy.reshape(-1, dy.shape[-1])
        product = flat * out.reshape(flat.shape)
        sums = column_sums(product, factor.dtype)
        if bias is not None:
            sums = sums - flat.sum(0).to(factor.dtype) * bias.to(factor.dtype)
        again = (
            None if torch.is_grad_enabled() else product
        )  # memory to reuse, unless this is differentiated too
        inward = torch.mul(flat, factor.to(dy.dtype), out=again).view(dy.shape)
        return inward, torch.where(factor == 0, 0.0, sums / factor), None, None


def column_sums(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over (N, O) in `dtype`; runs of rows first in their own, which a CPU adds up three times as fast."""
    if rows.shape[0] % _RUN == 0:
        rows = rows.view(rows.shape[0] // _RUN, _RUN, rows.shape[1]).sum(1)
    return rows.sum(0, dtype=dtype)
