"""Low-rank deltas as autograd functions: the base product, then the thin one accumulated in place.

These are pure functions of tensors; they know no adapter, site or card.

    y = x Wᵀ + b + s ((drop(x) Aᵀ) ∘ m) Bᵀ

    (..., I) an input, (O, I) a weight, A = `down` (R, I), B = `up` (O, R), m = `mask` broadcastable to (..., R).

Kept for backward: x itself (so that projections reading one tensor share one storage) and the parameters. x Aᵀ is
recomputed, which costs R / O of the base product. Factors are cast to the precision of x, never x to theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

_LEVELS = 256


@dataclass(frozen=True)
class _Drop:
    """A reproducible dropout mask: `seed` and how many of 256 byte values are dropped."""

    seed: int
    dropped: int

    @property
    def gain(self) -> float:
        return _LEVELS / (_LEVELS - self.dropped)

    def apply(self, x: Tensor) -> Tensor:
        """x with dropped elements at zero, not rescaled."""
        generator = torch.Generator(device=x.device).manual_seed(self.seed)
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None, generator=generator)
        drop = (words.view(torch.uint8)[: x.numel()] < self.dropped).view(x.shape)
        return x.masked_fill(drop, 0.0)


def _draw(dropout: float) -> _Drop | None:
    dropped = round(dropout * _LEVELS)
    if not dropped:
        return None
    return _Drop(int(torch.randint(2**62, ())), dropped)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scale: float,
    drop: _Drop | None,
) -> Tensor:
    dropped = x if drop is None else drop.apply(x)
    inner = functional.linear(dropped, down.to(x.dtype))
    if mask is not None:
        inner = inner * mask.to(x.dtype)
    gain = scale if drop is None else scale * drop.gain
    up = up.to(x.dtype)
    if weight is None:
        return functional.linear(inner * gain, up)
    y = functional.linear(x, weight, bias)
    y.view(-1, up.shape[0]).addmm_(inner.reshape(-1, up.shape[1]), up.t(), alpha=gain)
    return y


class _LowRank(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, mask, scale, drop, dtype):  # type: ignore
        wanted = ctx.needs_input_grad
        keeps_x = wanted[1] or wanted[3] or wanted[4] or wanted[5]
        ctx.save_for_backward(x if keeps_x else None, weight, down, up, mask)
        ctx.settings = scale, drop, dtype, x.dtype, None if bias is None else bias.dtype, x.shape
        to = None if weight is None else weight.to(dtype)
        return _forward(
            x.to(dtype), to, None if bias is None else bias.to(dtype), down, up, mask, scale, drop
        )

    @staticmethod
    def backward(ctx, dy):  # type: ignore
        x, weight, down, up, mask = ctx.saved_tensors
        scale, drop, dtype, x_dtype, bias_dtype, shape = ctx.settings
        if torch.is_autocast_enabled(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                return _LowRank._backward(ctx.needs_input_grad, dy, x, weight, down, up, mask, ctx.settings)
        return _LowRank._backward(ctx.needs_input_grad, dy, x, weight, down, up, mask, ctx.settings)

    @staticmethod
    def _backward(wanted, dy, x, weight, down, up, mask, settings):  # type: ignore
        scale, drop, dtype, x_dtype, bias_dtype, shape = settings
        gain = scale if drop is None else scale * drop.gain
        rank, width = down.shape
        dy2 = dy.reshape(-1, up.shape[0])
        a, b = down.to(dtype), up.to(dtype)
        dx = dw = dbias = da = db = dmask = None
        if x is not None:
            x2 = x.to(dtype).reshape(-1, width)
        if wanted[1]:
            dw = (dy2.t() @ x2).to(weight.dtype)
        if wanted[2]:
            dbias = dy2.sum(0).to(bias_dtype)
        inner_grad = dy2 @ b
        if wanted[3] or wanted[4] or wanted[5]:
            z = x2 if drop is None else drop.apply(x2)
            if wanted[4] or wanted[5]:
                inner = z @ a.t()
        if wanted[5]:
            dmask = (
                (gain * (inner_grad * inner).view(*shape[:-1], rank)).sum_to_size(mask.shape).to(mask.dtype)
            )
        if mask is not None:
            m = mask.to(dtype)
            inner_grad = (inner_grad.view(*shape[:-1], rank) * m).view(-1, rank)
            if wanted[4]:
                inner = (inner.view(*shape[:-1], rank) * m).view(-1, rank)
        if wanted[4]:
            db = (dy2.t() @ inner).to(up.dtype).mul_(gain)
        if wanted[3]:
            da = (inner_grad.t() @ z).to(down.dtype).mul_(gain)
        if wanted[0]:
            if drop is None and weight is not None:
                dx = (dy2 @ weight.to(dtype)).addmm_(inner_grad, a, alpha=gain)
            else:
                dx = (inner_grad * gain) @ a
                if drop is not None:
                    dx = drop.apply(dx)
                if weight is not None:
                    dx = dx.addmm_(dy2, weight.to(dtype))
            dx = dx.view(shape).to(x_dtype)
        return dx, dw, dbias, da, db, dmask, None, None, None


def _plain(x, weight, bias, down, up, mask, scale, dropout):  # type: ignore
    z = functional.dropout(x, dropout) if dropout else x
    inner = functional.linear(z, down.to(x.dtype)) * scale
    if mask is not None:
        inner = inner * mask.to(inner.dtype)
    delta = functional.linear(inner, up.to(inner.dtype))
    return delta if weight is None else functional.linear(x, weight, bias) + delta


def low_rank_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """A linear layer with a low-rank delta: x Wᵀ + b + scale ((drop(x) Aᵀ) ∘ mask) Bᵀ, shape (..., O).

    Args:
        x: (..., I).
        weight: (O, I), any strides; None returns the delta alone (`bias` must be None too).
        bias: (O,) or None.
        down, up: (R, I) and (O, R), in their own precision; gradients come back in it.
        dropout: probability of dropping an element of the delta's input, rounded to 1/256; 0 when evaluating.
            The mask comes from a seed drawn from torch's CPU generator and is never stored.
        mask: weights of the inner coordinates, broadcastable to (..., R), or None.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _plain(x, weight, bias, down, up, mask, scale, dropout)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    drop = _draw(dropout) if dropout else None
    return _LowRank.apply(x, weight, bias, down, up, mask, scale, drop, dtype)
