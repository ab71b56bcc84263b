"""What a frozen host need not keep for backward: the inside of a gated feed-forward and of an RMS norm.

Pure functions; each equals the host's own operations and keeps less. They can be differentiated once.

- `gated_feedforward` keeps x and the answers of gate and up; activation and product are made anew.
- `rms_norm` keeps its input in its own precision. (torch's layer norm does so already.)

N tokens, C channels, F inner channels of the feed-forward, I and O those of a projection, R rank
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from graftwork.engine.lowrank import any_tracked, low_rank_linear, outside_autocast, traced
from graftwork.errors import UnknownName, nearest


class Unfit(Exception):
    """A call that does not fit a lean form: the host's own forward runs instead, and the text, if any, is told."""


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer, perhaps with a low-rank delta: x Wᵀ + b + scale (x Aᵀ) Bᵀ.

    weight (O, I), bias (O,) or None; down (R, I) and up (O, R), or both None.
    """

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        if self.down is None or self.up is None:
            return functional.linear(x, self.weight, self.bias)
        return low_rank_linear(x, self.weight, self.bias, self.down, self.up, self.scale)

    @property
    def host(self) -> tuple[Tensor | None, ...]:
        """The frozen tensors."""
        return self.weight, self.bias

    @property
    def factors(self) -> tuple[Tensor | None, ...]:
        """What may train."""
        return self.down, self.up

    def inward(self, dy: Tensor, into: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The gradient of x (N, I) for that of the answer (N, O), added to `into`; and scale dy B (N, R)."""
        weight = self.weight.to(dy.dtype)
        dx = dy @ weight if into is None else into.addmm_(dy, weight)
        if self.down is None or self.up is None:
            return dx, None
        inner = dy @ (self.up * self.scale).to(dy.dtype)
        return dx.addmm_(inner, self.down.to(dy.dtype)), inner

    def learned(
        self, dy: Tensor, inner: Tensor | None, x: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of down and up, where wanted, of dy (N, O), `inner` (N, R) of `inward`, x (N, I)."""
        if self.down is None or self.up is None or inner is None:
            return None, None
        ddown = (inner.t() @ x).to(self.down.dtype) if wanted[0] else None
        if not wanted[1]:
            return ddown, None
        return ddown, (dy.t() @ (x @ self.down.to(x.dtype).t())).to(self.up.dtype) * self.scale


@dataclass(frozen=True)
class _Activation:
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


_aten = torch.ops.aten
ACTIVATIONS = {
    "silu": _Activation(functional.silu, _aten.silu_backward),
    "gelu": _Activation(functional.gelu, _aten.gelu_backward),
    "gelu_tanh": _Activation(
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda dy, x: _aten.gelu_backward(dy, x, approximate="tanh"),
    ),
    "relu": _Activation(functional.relu, lambda dy, x: _aten.threshold_backward(dy, x, 0)),
}


def gated_feedforward(
    x: Tensor, gate: Projection, up: Projection, down: Projection, activation: str = "silu"
) -> Tensor:
    """down(activation(gate(x)) * up(x)), with gradients for x and the low-rank factors.

    Args:
        x: (..., C).
        gate, up: (F, C) projections.
        down: (C, F) projection.
        activation: "silu", "gelu" (exact), "gelu_tanh" or "relu".

    A host weight that requires a gradient gets it, at the cost of what plain autograd keeps.
    """
    if activation not in ACTIVATIONS:
        raise UnknownName(f"activation {activation!r}. {nearest(activation, ACTIVATIONS)}")
    act = ACTIVATIONS[activation]
    projections = gate, up, down
    host = [tensor for each in projections for tensor in each.host]
    factors = [tensor for each in projections for tensor in each.factors]
    if traced() or any_tracked(*host) or not (torch.is_grad_enabled() and any_tracked(x, *factors)):
        return down(act.forward(gate(x)) * up(x))
    return _GatedFeedforward.apply(x, act, tuple(each.scale for each in projections), *host, *factors)


class _GatedFeedforward(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, act: _Activation, scales: tuple[float, ...], *tensors: Tensor | None
    ) -> Tensor:
        ctx.act, ctx.scales, ctx.x_dtype = act, scales, x.dtype
        gate, up, down = _projections(scales, tensors)
        gated, raised = gate(x), up(x)
        ctx.save_for_backward(x, gated, raised, *tensors)
        return down(act.forward(gated).mul_(raised))

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gated, raised, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[9:]
        gate, up, down = _projections(ctx.scales, tensors)
        lead = x.shape
        x, gated, raised, dy = (each.to(dy.dtype).flatten(0, -2) for each in (x, gated, raised, dy))
        active = ctx.act.forward(gated)
        dhidden, inner = down.inward(dy)
        of_down = down.learned(dy, inner, active * raised, wanted[4:])
        draised = active.mul_(dhidden)
        dgated = ctx.act.backward(dhidden.mul_(raised), gated)
        dx, inner = gate.inward(dgated)
        of_gate = gate.learned(dgated, inner, x, wanted[:2])
        dx, inner = up.inward(draised, into=dx)
        of_up = up.learned(draised, inner, x, wanted[2:4])
        to_x = dx.view(lead).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        return to_x, None, None, *(None,) * 6, *of_gate, *of_up, *of_down


def _projections(scales: tuple[float, ...], tensors: Sequence[Any]) -> list[Projection]:
    """From three hosts (weight, bias) and three pairs of factors, in the order gate, up, down."""
    hosts, factors = tensors[:6], tensors[6:]
    return [
        Projection(hosts[2 * i], hosts[2 * i + 1], factors[2 * i], factors[2 * i + 1], scale)
        for i, scale in enumerate(scales)
    ]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / rms(x) over the last axis, in fp32 and rounded to the precision of x before weighting.

    The numerics of transformers' Llama norm (Zhang and Sennrich 2019, arXiv:1910.07467).
    x (..., C), weight (C,); the answer has the wider precision of the two.
    """
    if traced() or not (torch.is_grad_enabled() and any_tracked(x, weight)):
        return weight * _normalised(x, eps)[0].to(x.dtype)
    return _RmsNorm.apply(x, weight, eps)


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) and 1 / rms(x), in fp32 (float64 stays)."""
    wide = x if x.dtype == torch.float64 else x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide * inverse, inverse


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return weight * _normalised(x, eps)[0].to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        unit, inverse = _normalised(x, ctx.eps)
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy * unit.to(x.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            dunit = (dy * weight).to(unit.dtype)
            share = (dunit * unit).mean(-1, keepdim=True)
            dx = dunit.sub(unit.mul_(share)).mul_(inverse).to(x.dtype)
        return dx, dweight, None
