"""A pure function of tensors as one autograd function that keeps its inputs and nothing it made on the way.

For products of small factors, whose intermediate results are cheap to make again and as large as a signal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from graftwork.engine.lowrank import any_tracked, outside_autocast, traced


def recomputed(function: Callable[..., Tensor], x: Tensor, *tensors: Tensor) -> Tensor:
    """`function(x, *tensors)`; backward runs it again instead of reading what it had kept.

    Args:
        function: pure and deterministic: reads nothing that changes between forward and backward but its arguments.
        x: a signal. tensors: whatever else may need a gradient.

    Under compilation and functorch the function is called as it is.
    """
    if traced() or not (torch.is_grad_enabled() and any_tracked(x, *tensors)):
        return function(x, *tensors)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        function = _under_autocast(function, device, torch.get_autocast_dtype(device))
    answer: Tensor = _Recomputed.apply(function, x, *tensors)
    return answer


def _under_autocast(
    function: Callable[..., Tensor], device: str, dtype: torch.dtype
) -> Callable[..., Tensor]:
    def run(*tensors: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return function(*tensors)

    return run


class _Recomputed(Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.function = function
        return function(*tensors)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            y = ctx.function(*inputs)
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True))
        return None, *(next(found) if need else None for need in needed)
