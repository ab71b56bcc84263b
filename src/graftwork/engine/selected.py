"""A linear layer of which a few input channels train: only their slice of the signal is kept.

y = x Wᵀ + b + x[..., S] Pᵀ      I, O channels, S the chosen inputs, P (O, |S|) the trained block
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from graftwork.engine.lowrank import any_tracked, outside_autocast, traced


def selected_linear(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, block: Tensor) -> Tensor:
    """x Wᵀ + b + x[..., index] blockᵀ, with gradients to x and block alone (W and b are frozen).

    Kept for backward: the slice (..., |S|), a copy, never x. No gradient of the size of W is made.
    """
    frozen = not any_tracked(weight, bias)
    autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    if traced() or autocast or not frozen or not (torch.is_grad_enabled() and any_tracked(x, block)):
        chosen = x.index_select(-1, index)
        return functional.linear(x, weight, bias) + functional.linear(chosen, block.to(x.dtype))
    answer: Tensor = _Selected.apply(x, weight, bias, index, block)
    return answer


class _Selected(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, block: Tensor
    ) -> Tensor:
        chosen = x.index_select(-1, index)
        y = functional.linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(chosen.view(-1, chosen.shape[-1]), block.to(x.dtype).t())
        ctx.save_for_backward(chosen if ctx.needs_input_grad[4] else None, weight, index, block)
        return y

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        chosen, weight, index, block = ctx.saved_tensors
        flat, dx, dblock = dy.reshape(-1, dy.shape[-1]), None, None
        if ctx.needs_input_grad[0]:
            dx = (flat @ weight).index_add_(1, index, flat @ block.to(dy.dtype)).view(*dy.shape[:-1], -1)
        if chosen is not None:
            dblock = (flat.t() @ chosen.view(-1, chosen.shape[-1])).to(block.dtype)
        return dx, None, None, None, dblock
