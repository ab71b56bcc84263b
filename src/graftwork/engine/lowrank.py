"""Low-rank deltas as autograd functions: the base product, then the thin one accumulated in place.

Pure functions of tensors; they know no adapter, site or card.

    y = x Wᵀ + b + s ((drop(x) Aᵀ) ∘ m) Bᵀ

x (..., I), W (O, I), A = `down` (R, I), B = `up` (O, R), m = `mask` broadcastable to (..., R). Kept for
backward: x itself, in its own precision, so that projections reading one tensor share one storage, and the
parameters. Nothing else: x Aᵀ is recomputed (R / O of the base product), a dropout mask is made anew from its
seed. Where neither W nor A trains, x Aᵀ is kept and x is not, and second derivatives are an error. The thin factors
are cast to the precision of x, never x to theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from graftwork.engine.dropout import Drop

_FEW_ROWS = 64


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
    """A linear layer with a low-rank delta: x Wᵀ + b + scale ((drop(x) Aᵀ) ∘ mask) Bᵀ.

    Args:
        x: (..., I).
        weight: (O, I), any strides; None gives the delta alone.
        bias: (O,) or None.
        down, up: (R, I) and (O, R) in any precision; their gradients come back in it. Stacked factors
            (G, R, I) and (G, O, R) serve G equal runs of consecutive rows of x, one pair each.
        scale: factor of the delta.
        dropout: probability of dropping an element of the delta's input, rounded to a multiple of 1/256 (what
            is kept is rescaled by the rounded rate); 0 when evaluating. No mask is stored, see `Drop`. Under
            compilation and functorch it is torch's own dropout.
        mask: weights of the inner coordinates, broadcastable to (..., R); may require a gradient.

    Returns: (..., O) in the precision of x (of autocast where it is on).
    """
    if traced():
        return _plain(x, weight, bias, down, up, mask, scale, dropout)
    dtype = compute_dtype(x)
    drop = Drop.draw(dropout) if dropout else None
    if torch.is_grad_enabled() and any_tracked(x, weight, bias, down, up, mask):
        return _LowRankLinear.apply(x, weight, bias, down, up, mask, scale, drop, dtype)
    if x.dtype is not dtype:
        x, weight, bias = x.to(dtype), cast(weight, dtype), cast(bias, dtype)
    inner = _masked(_inner(x.to(thin_dtype(x, dtype)), down, drop), mask, x.shape[:-1])
    return _product(x, weight, bias, inner, up, _gain(scale, drop))


def low_rank_embedding(
    ids: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    *,
    padding_idx: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What a low-rank delta adds to an embedding: scale (A[:, ids])ᵀ Bᵀ; only `ids` and the factors are kept.

    Args:
        ids: (...) token numbers.
        down, up: (R, V) and (C, R).
        scale: factor of the delta.
        padding_idx: a row that never learns, as in `torch.nn.Embedding`.
        dtype: precision of the answer (the host's); that of `up` by default.

    Returns: (..., C).
    """
    dtype = dtype or up.dtype
    if torch.is_grad_enabled() and not traced() and any_tracked(down, up):
        return _LowRankEmbedding.apply(ids, down, up, scale, padding_idx, dtype)
    inner = functional.embedding(ids, down.t(), padding_idx).to(dtype)
    return functional.linear(inner * scale, up.to(dtype))


def traced() -> bool:
    """Whether somebody else differentiates or records: functorch, the compiler, the tracer."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
        or torch.jit.is_tracing()
    )


def any_tracked(*tensors: Tensor | None) -> bool:
    """Whether one of them requires a gradient."""
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision of products with x: its own, or that of autocast where it is on."""
    device = x.device.type
    if device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def thin_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The precision of thin products without gradients, where others are in `dtype`: the same, but fp32 for a few rows
    in low precision on a CPU, where a product in bf16 costs four times as much before it has begun."""
    short = x.device.type == "cpu" and x.numel() <= _FEW_ROWS * x.shape[-1]
    return torch.float32 if short and dtype.itemsize < 4 else dtype


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in that precision, None for none."""
    return None if tensor is None else tensor.to(dtype)


def outside_autocast(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """A backward whose products keep the precision of the forward, whatever region it is called in."""

    @functools.wraps(backward)
    def run(ctx: Any, dy: Tensor) -> Any:
        if not torch.is_autocast_enabled(dy.device.type):
            return backward(ctx, dy)
        with torch.autocast(dy.device.type, enabled=False):
            return backward(ctx, dy)

    return run


def _plain(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """The definition, in operations that every tracer and transform knows."""
    dtype = compute_dtype(x)
    dropped = functional.dropout(x, dropout) if dropout else x
    inner = (_rows(dropped.to(dtype), down) @ down.to(dtype).mT * scale).reshape(*x.shape[:-1], -1)
    if mask is not None:
        inner = inner * mask.to(dtype)
    delta = (_rows(inner, up) @ up.to(dtype).mT).reshape(*x.shape[:-1], -1)
    return delta if weight is None else functional.linear(x, weight, bias) + delta


def _rows(x: Tensor, factor: Tensor) -> Tensor:
    """x (..., C) as (N, C), or as (G, N / G, C) beside stacked factors."""
    return x.reshape(-1, x.shape[-1]) if factor.dim() == 2 else x.reshape(len(factor), -1, x.shape[-1])


def _masked(inner: Tensor, mask: Tensor | None, lead: torch.Size) -> Tensor:
    """Rows of inner coordinates times the mask given in the leading shape of the input."""
    if mask is None:
        return inner
    return (inner.view(*lead, -1) * mask.to(inner.dtype)).view(inner.shape)


def _gain(scale: float, drop: Drop | None) -> float:
    """The factor of the delta, with what makes up for the elements that are dropped."""
    return scale if drop is None else scale * drop.gain


def _inner(x: Tensor, down: Tensor, drop: Drop | None) -> Tensor:
    """drop(x) Aᵀ in rows."""
    rows = _rows(x if drop is None else drop.apply(x), down)
    return (torch.mm if down.dim() == 2 else torch.bmm)(rows, down.to(x.dtype).mT)


def _product(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, inner: Tensor, up: Tensor, gain: float
) -> Tensor:
    """The whole product in the precision of x, in place: no gradient is being recorded."""
    up, flat = up.to(inner.dtype), up.dim() == 2
    if weight is None or inner.dtype is not x.dtype:
        product = (torch.mm if flat else torch.bmm)(inner, up.mT).view(*x.shape[:-1], -1)
        if weight is not None:
            return functional.linear(x, weight, bias).add_(product, alpha=gain)
        return (product if gain == 1 else product.mul_(gain)).to(x.dtype)
    y = functional.linear(x, weight, bias)
    if flat:
        y.view(-1, y.shape[-1]).addmm_(inner, up.t(), alpha=gain)
    else:
        y.view(len(up), -1, y.shape[-1]).baddbmm_(inner, up.mT, alpha=gain)
    return y


class _LowRankLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        mask: Tensor | None,
        scale: float,
        drop: Drop | None,
        dtype: torch.dtype,
    ) -> Tensor:
        to_x, to_weight, _, to_down, to_up, to_mask, *_ = ctx.needs_input_grad
        computed = x if x.dtype == dtype else x.to(dtype)
        inner = _inner(computed, down, drop)
        ctx.keeps_inner = not (to_weight or to_down) and down.shape[-2] < down.shape[-1]
        kept = None if not (to_weight or to_down or to_up or to_mask) else inner if ctx.keeps_inner else x
        reads_down = to_x or (kept is not None and not ctx.keeps_inner)  # it may be computed, and then counts
        ctx.save_for_backward(kept, weight, down if reads_down else None, up, mask)
        ctx.scale, ctx.drop, ctx.lead, ctx.x_dtype = scale, drop, x.shape[:-1], x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        masked = _masked(inner, mask, ctx.lead)
        return _product(computed, cast(weight, dtype), cast(bias, dtype), masked, up, _gain(scale, drop))

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients = once_differentiable(_gradients) if ctx.keeps_inner else _gradients
        return (*gradients(ctx, dy), None, None, None)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, down, up and mask, each None unless needed."""
    kept, weight, down, up, mask = ctx.saved_tensors
    to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
    kept = None if kept is None else kept.to(dy.dtype)
    flat, rows = dy.reshape(-1, dy.shape[-1]), _rows(dy, up)
    gain = _gain(ctx.scale, ctx.drop)
    unmasked = rows @ (up * gain).to(dy.dtype)
    inner = _masked(unmasked, mask, ctx.lead)
    dx = dweight = dbias = None
    if to_weight and kept is not None:
        dweight = (flat.t() @ kept.reshape(-1, kept.shape[-1])).to(weight.dtype)
    if to_bias:
        dbias = flat.sum(0).to(ctx.bias_dtype)
    narrow: Any = cast(down, dy.dtype)  # None where nothing below reads it
    factors = _factor_gradients(ctx, (kept, down, narrow, up, mask), rows, unmasked, inner, gain)
    if to_x:
        base = None if weight is None else flat @ weight.to(dy.dtype)
        dx = _input_gradient(base, inner, narrow, ctx.drop).view(*ctx.lead, -1).to(ctx.x_dtype)
    return dx, dweight, dbias, *factors


def _input_gradient(base: Tensor | None, inner: Tensor, down: Tensor, drop: Drop | None) -> Tensor:
    """The gradient through the delta, added to that through the host."""
    if base is None or drop is not None:
        thin = inner @ down if drop is None else drop.apply(inner @ down)
        return thin if base is None else base.add_(thin.view(base.shape))
    if down.dim() == 2:
        return base.addmm_(inner, down)
    return base.view(len(down), -1, base.shape[-1]).baddbmm_(inner, down)


def _factor_gradients(
    ctx: Any, saved: tuple[Tensor, ...], dy: Tensor, unmasked: Tensor, dinner: Tensor, gain: float
) -> tuple[Tensor | None, ...]:
    """Gradients of down, up and mask; `unmasked` and `dinner` hold the gain, x Aᵀ is made anew unless it was kept."""
    kept, down, narrow, up, mask = saved  # unpacked once: recomputation refuses a second time
    to_down, to_up, to_mask = ctx.needs_input_grad[3:6]
    if kept is None or not (to_down or to_up or to_mask):
        return None, None, None
    dropped = kept if ctx.keeps_inner else _rows(kept if ctx.drop is None else ctx.drop.apply(kept), down)
    ddown = (dinner.mT @ dropped).to(down.dtype) if to_down else None
    if not (to_up or to_mask):
        return ddown, None, None
    inner = kept if ctx.keeps_inner else dropped @ narrow.mT
    dup = (dy.mT @ _masked(inner, mask, ctx.lead)).to(up.dtype).mul_(gain) if to_up else None
    if not to_mask:
        return ddown, dup, None
    dmask = (unmasked * inner).view(*ctx.lead, -1).sum_to_size(mask.shape).to(mask.dtype)
    return ddown, dup, dmask


class _LowRankEmbedding(Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        down: Tensor,
        up: Tensor,
        scale: float,
        padding_idx: int | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(ids, down, up)
        ctx.scale, ctx.padding_idx = scale, padding_idx
        inner = functional.embedding(ids, down.t()).to(dtype)
        return functional.linear(inner.mul_(scale), up.to(dtype))

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ids, down, up = ctx.saved_tensors
        _, to_down, to_up, *_ = ctx.needs_input_grad
        ids, flat = ids.reshape(-1), dy.reshape(-1, dy.shape[-1])
        ddown = dup = None
        if to_up:
            inner = functional.embedding(ids, down.t()).to(dy.dtype)
            dup = (flat.t() @ inner).to(up.dtype) * ctx.scale
        if to_down:
            dinner = (flat @ (up * ctx.scale).to(dy.dtype)).to(down.dtype)
            if ctx.padding_idx is not None:
                dinner = dinner * (ids != ctx.padding_idx).unsqueeze(1)
            table = dinner.new_zeros(down.shape[1], down.shape[0])
            ddown = table.index_add(0, ids, dinner).t().contiguous()
        return None, ddown, dup, None, None, None
