"""A Kronecker product with a signal, factor by factor, as one autograd function that keeps the signal alone.

y = kron(C, D1 D2) x = C X (D1 D2)ᵀ    C = `left` (o1, i1), D1 = `outer` (o2, R), D2 = `inner` (R, i2), X (i1, i2)

N rows of x; h = X D2ᵀ (N, i1, R) and m = C h (N, o1, R) are made again in backward, y is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from graftwork.engine.lowrank import any_tracked, compute_dtype, outside_autocast, traced


def kronecker(x: Tensor, left: Tensor, outer: Tensor, inner: Tensor | None = None) -> Tensor:
    """kron(left, outer inner) x in the precision of x (of autocast where it is on).

    Args:
        x: (..., i1 i2).
        left, outer, inner: (o1, i1), (o2, R), (R, i2) in any precision; without `inner`, outer is (o2, i2).

    Returns: (..., o1 o2).
    """
    x = x.to(compute_dtype(x))
    if traced() or not (torch.is_grad_enabled() and any_tracked(x, left, outer, inner)):
        rows, factors = _prepared(x, left, outer, inner)
        return _outward(_mixed(rows, *factors)[1], factors[1], x)
    answer: Tensor = _Kronecker.apply(x, left, outer, inner)
    return answer


class _Kronecker(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, outer: Tensor, inner: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, left, outer, inner)
        rows, factors = _prepared(x, left, outer, inner)
        return _outward(_mixed(rows, *factors)[1], factors[1], x)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        rows, (left, outer, inner) = _prepared(x, *saved)
        h, m = _mixed(rows, left, outer, inner)
        flat = dy.reshape(-1, outer.shape[0])
        douter = flat.t() @ m.reshape(-1, m.shape[-1])
        dm = (flat @ outer).view(m.shape)
        dleft = _columns(dm) @ _columns(h).t()
        dh = (left.t() @ dm).reshape(-1, h.shape[-1])
        dinner = None if inner is None else dh.t() @ rows
        dx = (dh if inner is None else dh @ inner).view(x.shape)
        found = zip((dleft, douter, dinner), saved, strict=True)
        return dx, *(None if each is None else each.to(like.dtype) for each, like in found)


def _prepared(
    x: Tensor, left: Tensor, outer: Tensor, inner: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """Rows (N i1, i2) of x, and the factors in its precision."""
    factors = left.to(x.dtype), outer.to(x.dtype), None if inner is None else inner.to(x.dtype)
    return x.reshape(-1, x.shape[-1] // left.shape[1]), factors


def _mixed(rows: Tensor, left: Tensor, outer: Tensor, inner: Tensor | None) -> tuple[Tensor, Tensor]:
    """h (N, i1, R) and m (N, o1, R)."""
    h = (rows if inner is None else rows @ inner.t()).unflatten(0, (-1, left.shape[1]))
    return h, left @ h


def _outward(m: Tensor, outer: Tensor, x: Tensor) -> Tensor:
    return (m.flatten(0, 1) @ outer.t()).reshape(*x.shape[:-1], -1)


def _columns(h: Tensor) -> Tensor:
    """(N, i, R) -> (i, N R)."""
    return h.transpose(0, 1).flatten(1)
