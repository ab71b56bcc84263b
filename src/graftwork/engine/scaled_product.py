"""A product of two frozen matrices between trained vectors, applied to a signal vector by vector.

    delta = (((x Aᵀ) ∘ d) Bᵀ) ∘ b

x (..., I), A = `down` (R, I), d = `inner` (R,), B = `up` (O, R), b = `outer` (O,). Kept for backward: x Aᵀ and the
product before b, whose sums over the rows are the gradients of the vectors; no gradient of the size of A or B is made.
Second derivatives are an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from graftwork.engine.lowrank import any_tracked, compute_dtype, outside_autocast, traced
from graftwork.engine.rescaled import column_sums


def scaled_product(x: Tensor, down: Tensor, inner: Tensor, up: Tensor, outer: Tensor) -> Tensor:
    """The delta (..., O) in the precision of x (of autocast where it is on), with gradients to x, inner and outer."""
    x = x.to(compute_dtype(x))
    if traced() or not (torch.is_grad_enabled() and any_tracked(x, inner, outer)):
        thin = functional.linear(x, down.to(x.dtype)) * inner.to(x.dtype)
        return functional.linear(thin, up.to(x.dtype)) * outer.to(x.dtype)
    delta: Tensor = _ScaledProduct.apply(x, down, inner, up, outer)
    return delta


class _ScaledProduct(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, inner: Tensor, up: Tensor, outer: Tensor) -> Tensor:
        thin = functional.linear(x, down.to(x.dtype))
        wide = functional.linear(thin * inner.to(x.dtype), up.to(x.dtype))
        ctx.save_for_backward(thin, wide, down, inner, up, outer)
        return wide * outer.to(x.dtype)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        thin, wide, down, inner, up, outer = ctx.saved_tensors
        to_x, _, to_inner, _, to_outer = ctx.needs_input_grad
        flat = dy.reshape(-1, dy.shape[-1])
        dthin = flat @ (outer.unsqueeze(-1) * up).to(dy.dtype)
        dx = dinner = douter = None
        if to_outer:
            douter = column_sums(flat * wide.view(flat.shape), outer.dtype)
        if to_inner:
            dinner = column_sums(dthin * thin.view(dthin.shape), inner.dtype)
        if to_x:
            dx = (dthin @ (inner.unsqueeze(-1) * down).to(dy.dtype)).view(*dy.shape[:-1], down.shape[1])
        return dx, None, dinner, None, douter
