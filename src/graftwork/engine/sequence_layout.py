"""Where slots lie among a row's own positions: one index builds what a stack reads, its inverse takes it off.

A row of n slots and T own positions is laid out as

    [filler][positions before `start`][prompt][the rest]    filler in front: windows stay together
    [positions before `start`][prompt][filler][the rest]    filler behind: the first stays the first

where a prompt shorter than n leaves filler. `start` counts leading padding and what must stay in front (CLS;
nothing for a prompt that asks for the very front).

    B samples, T own positions, n slots, C channels
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from graftwork.errors import RouteError


@dataclass(frozen=True)
class Layout:
    """Slots of one batch.

    Attributes:
        length: n, slots in every row.
        start: (B,) own positions in front of the prompt.
        counts: (B,) positions of each row's prompt; None: n in every row.
        front: filler in front of the row, else behind the prompt.
    """

    length: int
    start: Tensor
    counts: Tensor | None
    front: bool

    @property
    def lengths(self) -> Tensor:
        """(B,) positions of each row's prompt."""
        return torch.full_like(self.start, self.length) if self.counts is None else self.counts

    def used(self) -> Tensor:
        """(B, n) true where a slot holds a prompt position, the prompt first."""
        return self._order() < self.lengths[:, None]

    def real(self, total: int) -> Tensor | None:
        """(B, total) true but where a slot is filler; None where there is none."""
        if self.counts is None:
            return None
        own = torch.ones(len(self.start), total - self.length, dtype=torch.bool, device=self.start.device)
        return self.merge(self.used(), own)

    def slots(self) -> Tensor:
        """(B, n) where each slot lies: the prompt's in order, then the filler's."""
        order, start = self._order(), self.start[:, None]
        if not self.front:
            return order + start
        count = self.lengths[:, None]
        return torch.where(order < count, order + start + (self.length - count), order - count)

    def own(self, total: int) -> Tensor:
        """(B, total) where each own position lies."""
        order = torch.arange(total, device=self.start.device)
        before = (self.length - self.lengths)[:, None] if self.front else 0
        return order + torch.where(order < self.start[:, None], before, self.length)

    def merge(self, slots: Tensor, own: Tensor) -> Tensor:
        """(B, n + T, ...) of what the slots hold (B, n, ...) and what the row holds (B, T, ...)."""
        source = torch.empty(
            len(self.start), self.length + own.shape[1], dtype=torch.long, device=self.start.device
        )
        where = torch.cat([self.slots(), self.own(own.shape[1])], dim=1)
        source = source.scatter(1, where, torch.arange(where.shape[1], device=where.device).expand_as(where))
        return _pick(torch.cat([slots, own], dim=1), source)

    def take(self, whole: Tensor, dim: int = 1) -> Tensor:
        """The own positions of `whole`, whose dimension `dim` has slots among them."""
        where = self.own(whole.shape[dim] - self.length)
        return (
            whole.movedim(dim, 1)
            if not where.shape[1]
            else _pick(whole.movedim(dim, 1), where).movedim(1, dim)
        )

    def repeated(self, batch: int, what: str) -> Layout:
        """The layout for a batch that is a multiple of this one's (beams, several answers each)."""
        size = len(self.start)
        if batch == size:
            return self
        if batch % size:
            raise RouteError(f"{what} was laid out for {size} rows, now there are {batch}")
        return self.select(torch.arange(size, device=self.start.device).repeat_interleave(batch // size))

    def select(self, rows: Tensor) -> Layout:
        """The layout of some rows (beams re-ordered)."""
        rows = rows.to(self.start.device)
        counts = None if self.counts is None else self.counts.index_select(0, rows)
        return Layout(self.length, self.start.index_select(0, rows), counts, self.front)

    def _order(self) -> Tensor:
        return torch.arange(self.length, device=self.start.device)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """values (B, S, ...) at index (B, P) -> (B, P, ...); keeps the index for backward and none of the values."""
    first = torch.arange(len(index), device=index.device)[:, None] * values.shape[1]
    return values.flatten(0, 1).index_select(0, (first + index).flatten()).unflatten(0, tuple(index.shape))


def leading(mask: Tensor, keep: Tensor) -> Tensor:
    """(B,) own positions in front of a prompt: leading padding of a mask (B, T) and `keep` (B,) more."""
    return ((mask.cumsum(1) == 0).sum(1) + keep).clamp(max=mask.shape[1])


def behind_one_another(pieces: list[Tensor], beside: list[Tensor]) -> Tensor:
    """(n, C) of pieces, or (B, n, C) where any of them, or of those beside, is for B samples that have their own."""
    own = [piece.shape[:1] for piece in beside if piece.dim() == 3]
    return torch.cat([piece.expand(*own[0], -1, -1) for piece in pieces] if own else pieces, -2)


def table(rows: list[list[Tensor]], length: int, like: Tensor) -> Tensor:
    """(R, length, C): each row's pieces (n, C) one after another, padded, in the precision of `like` (..., C).

    (R, B, length, C) where any piece is (B, n, C), with B samples that have their own.
    """
    everything = [piece for pieces in rows for piece in pieces]
    made = [behind_one_another(pieces or [like.new_zeros(0, like.shape[-1])], everything) for pieces in rows]
    return torch.stack(
        [functional.pad(row.to(like.dtype), (0, 0, 0, length - row.shape[-2])) for row in made]
    )
