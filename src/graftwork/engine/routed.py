"""Many low-rank adapters in one batch, each row or token through its own: pure functions of tensors.

    y_n = x_n Wᵀ + b + (x_n A_kᵀ) B_kᵀ   with k = index_n, and x_n Wᵀ + b where index_n is -1

K adapters of one padded rank R, B rows of T tokens. Four ways, all equal to that definition, of which
`low_rank_routed` takes the first that applies:

- even: rows in equal runs, adapter after adapter: one batched product per factor, nothing copied.
- gathered: long rows, (K - 1) T >= 64: factors copied per row (R (I + O) elements), batched products.
- grouped: short rows, no gradients, (K - 1) B elements are 400 bytes or more: rows put into groups padded to the
  largest, if that at most doubles them.
- masked: anything else, and per token: all factors side by side and a mask over the K R inner coordinates,
  so K times the thin products.

The limits are where two ways cost the same, measured for widths of 512 to 1400 on a CPU in fp32 and bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from graftwork.engine.lowrank import low_rank_linear
from graftwork.errors import RouteError

_COPY_PAYS, _GROUPING_PAYS = 64, 400


@dataclass(frozen=True)
class Stack:
    """Factors of K adapters: `down` (K, R, I) and `up` (K, R, O), transposed and with the scale folded in."""

    down: Tensor
    up: Tensor

    @classmethod
    def of(
        cls, factors: Sequence[tuple[Tensor, Tensor, float] | None], dtype: torch.dtype | None = None
    ) -> Stack:
        """From (down (R, I), up (O, R), scale) of each adapter; None where it has no module at this place.

        Smaller ranks are padded with zeros; gradients flow back; `dtype` casts for reuse without gradients.
        """
        known = [each for each in factors if each is not None]
        rank = max(down.shape[0] for down, _, _ in known)
        down, up, _ = known[0]
        absent = down.new_zeros(0, down.shape[1]), up.new_zeros(up.shape[0], 0), 1.0
        rows = [absent if each is None else each for each in factors]
        downs = torch.stack([_padded(down, rank) for down, _, _ in rows])
        ups = torch.stack([_padded((up * scale).t(), rank) for _, up, scale in rows])
        return cls(downs.to(dtype or downs.dtype), ups.to(dtype or ups.dtype))

    def part(self, low: int, high: int) -> Stack:
        """The adapters from `low` up to `high` (views)."""
        return self if high - low == len(self.down) else Stack(self.down[low:high], self.up[low:high])


@dataclass(frozen=True)
class Rows:
    """A route laid out for a batch, prepared once per forward and read by every site.

    Attributes:
        index: (B,) or (B, T) numbers of adapters, -1 for the bare base.
        count: number of adapters K.
        low, high: the range of adapters in use.
        even: the rows come in equal runs, one run for each adapter of the range in order.
        bare: some row goes to the bare base.
        pick, slots: rows to take for equal groups, and where each row is in them; None unless worth while.
    """

    index: Tensor
    count: int
    low: int
    high: int
    even: bool = False
    bare: bool = False
    pick: Tensor | None = None
    slots: Tensor | None = None
    masks: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, index: Tensor, count: int) -> Rows:
        """Lay out an index (B,) or (B, T); reads it on the host once."""
        if index.dim() == 2 and index.shape[1] == 1:
            index = index.squeeze(1)
        numbers = index.flatten().tolist()
        used = sorted({number for number in numbers if number >= 0}) or [0]
        low, high, bare = used[0], used[-1] + 1, min(numbers) < 0
        if index.dim() == 2:
            return cls(index, count, 0, count, bare=bare)
        members = [
            [row for row, number in enumerate(numbers) if number == adapter] for adapter in range(low, high)
        ]
        longest = max(len(rows) for rows in members)
        runs = [adapter for adapter in range(low, high) for _ in range(longest)]
        even = not bare and numbers == runs  # a shorter last run is not even
        if even or len(members) * longest > 2 * len(numbers) or longest == 0:
            return cls(index, count, low, high, even, bare)
        pick = [row for rows in members for row in (rows + [0] * longest)[:longest]]
        places = {row: g * longest + i for g, rows in enumerate(members) for i, row in enumerate(rows)}
        slots = [places.get(row, 0) for row in range(len(numbers))]
        return cls(index, count, low, high, even, bare, index.new_tensor(pick), index.new_tensor(slots))

    def span(self) -> tuple[int, int]:
        """The range of adapters to compute: all in a compiled graph, which must not depend on the numbers."""
        return (0, self.count) if torch.compiler.is_compiling() else (self.low, self.high)

    def adapted(self, dims: int, dtype: torch.dtype) -> Tensor | None:
        """(B, 1, ...) of `dims` dimensions with 0 for rows of the bare base; None where all are 1."""
        if not (torch.compiler.is_compiling() or self.bare):
            return None
        return (self.index >= 0).to(dtype).view(-1, *(1,) * (dims - 1))

    def mask(self, rank: int, dims: int, dtype: torch.dtype) -> Tensor:
        """(B, 1 or T, ..., R x adapters of the span) with 1 for the coordinates of each row's own adapter."""
        if torch.compiler.is_compiling():
            return self._mask(rank, dims, dtype)
        key = rank, dims, dtype
        if key not in self.masks:
            self.masks[key] = self._mask(rank, dims, dtype)
        return self.masks[key]

    def _mask(self, rank: int, dims: int, dtype: torch.dtype) -> Tensor:
        owners = torch.arange(*self.span(), device=self.index.device).repeat_interleave(rank)
        index = self.index.view(*self.index.shape, *(1,) * (dims - self.index.dim()))
        return (index == owners).to(dtype)


def low_rank_routed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, stack: Stack, rows: Rows, *, dropout: float = 0.0
) -> Tensor:
    """A linear layer with a low-rank delta chosen by row or token; arguments otherwise as `low_rank_linear`.

    Args:
        x: (B, ..., I), or (B, T, ..., I) for a route per token.
        stack: factors of the K adapters the route points into.
        rows: the route laid out for these B rows.
    """
    index, size = rows.index, x.shape
    if index.shape != size[: index.dim()]:
        raise RouteError(f"the route covers {tuple(index.shape)}, the signal is {tuple(size)}")
    part = stack.part(*rows.span())
    others = len(part.down) - 1
    eager = not torch.compiler.is_compiling()
    if eager and rows.even:
        down, up = (part.down, part.up) if others else (part.down[0], part.up[0])
        return low_rank_linear(x, weight, bias, down, up.mT, 1.0, dropout=dropout)
    if index.dim() == 1:
        if others * x.numel() >= _COPY_PAYS * size[0] * size[-1]:
            return _gathered(x, weight, bias, part, rows, dropout)
        grouping_pays = others * size[0] * part.down.element_size() >= _GROUPING_PAYS
        if eager and grouping_pays and rows.pick is not None and not torch.is_grad_enabled():
            return _grouped(x, weight, bias, part, rows)
    mask = rows.mask(part.down.shape[1], x.dim(), x.dtype)
    down, up = part.down.flatten(0, 1), part.up.flatten(0, 1).t()
    return low_rank_linear(x, weight, bias, down, up, 1.0, dropout=dropout, mask=mask)


def _gathered(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, part: Stack, rows: Rows, dropout: float
) -> Tensor:
    index = (rows.index - rows.span()[0]).clamp_min(0)
    down, up = part.down.index_select(0, index), part.up.index_select(0, index).mT
    adapted = rows.adapted(x.dim(), x.dtype)
    return low_rank_linear(x, weight, bias, down, up, 1.0, dropout=dropout, mask=adapted)


def _grouped(x: Tensor, weight: Tensor | None, bias: Tensor | None, part: Stack, rows: Rows) -> Tensor:
    assert rows.pick is not None
    assert rows.slots is not None
    picked = x.index_select(0, rows.pick).to(part.down.dtype).view(len(part.down), -1, x.shape[-1])
    wide = torch.bmm(torch.bmm(picked, part.down.mT), part.up).view(len(rows.pick), *x.shape[1:-1], -1)
    delta = wide.index_select(0, rows.slots)
    adapted = rows.adapted(x.dim(), delta.dtype)
    delta = delta if adapted is None else delta.mul_(adapted)
    return delta.to(x.dtype) if weight is None else functional.linear(x, weight, bias).add_(delta)


def _padded(factor: Tensor, rank: int) -> Tensor:
    return factor if factor.shape[0] == rank else functional.pad(factor, (0, 0, 0, rank - factor.shape[0]))
