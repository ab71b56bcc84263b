"""Cross-entropy over a large vocabulary, without the logits of all rows at once: a pure function.

The gradient of the head's input is found while the logits of a chunk of rows are at hand, and kept in their
place. The gradient of the loss itself comes in last, so that half-precision loss scaling loses nothing.

N rows, C channels, V vocabulary, R rank
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from graftwork.engine.lean import Projection
from graftwork.engine.lowrank import any_tracked, compute_dtype, traced


def chunked_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    head_bias: Tensor | None = None,
    factors: tuple[Tensor, Tensor, float] | None = None,
    chunk: int = 256,
    ignore_index: int = -100,
    items: Tensor | int | None = None,
) -> Tensor:
    """Mean cross-entropy of a linear head.

    Args:
        hidden: (..., C), aligned with `labels` (the caller shifts them).
        head_weight, head_bias: (V, C) and (V,) or None. Where one requires a gradient, plain autograd runs.
        labels: (...) numbers of the right tokens.
        factors: (down (R, C), up (V, R), scale) of a low-rank delta of the head, or None.
        chunk: rows whose logits exist at a time.
        ignore_index: label of rows that do not count.
        items: what to divide the sum by, instead of the number of rows that count.

    Returns: a scalar in fp32 (float64 for float64 input), differentiable once. Logits are rounded to the
    compute precision, as the host's are.
    """
    head = Projection(head_weight, head_bias, *(factors or ()))
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    count = (labels != ignore_index).sum() if items is None else items
    if traced() or any_tracked(*head.host):
        logits = _wide(head(flat))
        return functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum") / count
    needed = torch.is_grad_enabled() and any_tracked(flat, *head.factors)
    settings = _Settings(head.scale, chunk, ignore_index, needed, compute_dtype(flat))
    return _ChunkedLoss.apply(flat, labels, settings, *head.host, *head.factors) / count


@dataclass(frozen=True)
class _Settings:
    scale: float
    rows: int
    ignored: int
    gradients: bool
    dtype: torch.dtype


class _ChunkedLoss(Function):
    """The sum over rows that count."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        settings: _Settings,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
    ) -> Tensor:
        dtype = settings.dtype
        bias = None if bias is None else bias.to(dtype)
        head = Projection(weight.to(dtype), bias, down, up, settings.scale)
        total = hidden.new_zeros((), dtype=_wide_dtype(hidden))
        grads = _Gradients(head, hidden, ctx.needs_input_grad[5:], dtype) if settings.gradients else None
        for start in range(0, len(hidden), settings.rows):
            rows = hidden[start : start + settings.rows].to(dtype)
            target = labels[start : start + settings.rows].unsqueeze(1)
            counts = target != settings.ignored
            target = target.where(counts, 0)
            logs = functional.log_softmax(_wide(head(rows)), dim=-1)
            total -= logs.gather(1, target).mul_(counts).sum()
            if grads is not None:
                grads.add(start, rows, logs.exp_(), target, counts)
        if grads is not None:
            ctx.save_for_backward(*grads.found)
            ctx.hidden_dtype = hidden.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, ddown, dup = (None if each is None else each * dtotal for each in ctx.saved_tensors)
        dhidden = dhidden.to(ctx.hidden_dtype) if dhidden is not None else None
        return dhidden, None, None, None, None, ddown, dup


class _Gradients:
    """Gradients of the sum, filled chunk by chunk."""

    def __init__(
        self, head: Projection, hidden: Tensor, wanted: tuple[bool, ...], dtype: torch.dtype
    ) -> None:
        self.head, self.wanted = head, wanted
        self.hidden = torch.empty_like(hidden, dtype=dtype)
        self.factors = [
            torch.zeros_like(factor) if factor is not None and needed else None
            for factor, needed in zip(head.factors, wanted, strict=True)
        ]

    @property
    def found(self) -> tuple[Tensor | None, ...]:
        return self.hidden, *self.factors

    def add(self, start: int, rows: Tensor, likely: Tensor, target: Tensor, counts: Tensor) -> None:
        """One chunk: `rows` (n, C), `likely` (n, V) their softmax (consumed), `target`, `counts` (n, 1)."""
        dlogits = likely.scatter_add_(1, target, likely.new_tensor(-1.0).expand(target.shape)).to(rows.dtype)
        dhidden, inner = self.head.inward(dlogits)
        self.hidden[start : start + len(rows)] = dhidden.mul_(counts)
        inner = None if inner is None else inner.mul_(counts)
        learned = self.head.learned(dlogits, inner, rows * counts, self.wanted)
        for total, part in zip(self.factors, learned, strict=True):
            if total is not None and part is not None:
                total += part


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor))
