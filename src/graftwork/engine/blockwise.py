"""A block-diagonal matrix on the channels of a signal, as one autograd function that keeps the signal alone.

y = diag(blocks) x      blocks (count, b, b), x (..., count b)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from graftwork.engine.lowrank import any_tracked, compute_dtype, outside_autocast, traced


def blockwise(x: Tensor, blocks: Tensor) -> Tensor:
    """Each run of channels of x (..., I) multiplied by its matrix, in the precision of x (of autocast where it is on).

    Args:
        x: I = count b channels.
        blocks: (..., count, b, b) in any precision; leading dimensions are broadcast with those of x.
    """
    dtype = compute_dtype(x)
    if traced() or blocks.dim() > 3:
        parts = x.to(dtype).unflatten(-1, blocks.shape[-3:-1])
        return torch.einsum("...nc,...nbc->...nb", parts, blocks.to(dtype)).flatten(-2)
    if not (torch.is_grad_enabled() and any_tracked(x, blocks)):
        return _product(x.to(dtype), blocks)
    answer: Tensor = _Blockwise.apply(x.to(dtype), blocks)
    return answer


class _Blockwise(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, blocks)
        return _product(x, blocks)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, blocks = ctx.saved_tensors
        dx = _product(dy, blocks.mT) if ctx.needs_input_grad[0] else None
        dblocks = None if x is None else (_runs(dy, blocks).mT @ _runs(x, blocks)).to(blocks.dtype)
        return dx, dblocks


def _product(x: Tensor, blocks: Tensor) -> Tensor:
    count, size, _ = blocks.shape
    rows = x.reshape(-1, count, size)
    out = torch.empty_like(rows)
    torch.bmm(rows.transpose(0, 1), blocks.to(x.dtype).mT, out=out.transpose(0, 1))
    return out.view(x.shape)


def _runs(x: Tensor, blocks: Tensor) -> Tensor:
    """(count, N, b). Copied in low precision, whose products a CPU does not take from strided memory."""
    runs = x.reshape(-1, *blocks.shape[:2]).transpose(0, 1)
    return runs.contiguous() if x.element_size() < 4 else runs
