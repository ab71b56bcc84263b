"""Positions behind a prefix that was counted: own positions start at its length, not at zero.

A prefix stored in a cache, as HF PEFT does it, moves every token by its length. Keys and values put in at
attention leave the tokens where they are, so a module with `shift_positions` asks for the move.

    B samples, H heads, Q query positions, N prefix positions
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.engine import sequence_cache as caches
from graftwork.engine.seat import Seat
from graftwork.reference.properties import Port


@dataclass(frozen=True)
class Shift:
    """One forward's move.

    Attributes:
        by: (B,) positions.
        longest: the largest of them.
        bias: the attention module whose relative bias all layers of its stack share (T5), None elsewhere.
        past: own positions in the cache.
    """

    by: Tensor
    longest: int
    bias: Any
    past: Any

    def columns(self, queries: int, count: int) -> Tensor:
        """(B, H, Q, N) relative bias of a prefix at positions -shift ... -1; zero for rows without a move."""
        device = self.by.device
        memory = torch.arange(count, device=device) - self.by[:, None, None]
        context = (torch.arange(queries, device=device) + self.past)[None, :, None]
        buckets = self.bias._relative_position_bucket(
            memory - context,
            bidirectional=not self.bias.is_decoder,
            num_buckets=self.bias.relative_attention_num_buckets,
            max_distance=self.bias.relative_attention_max_distance,
        )
        moved = (self.by > 0)[:, None, None, None]
        return self.bias.relative_attention_bias(buckets).permute(0, 3, 1, 2) * moved


def shift_of(
    seats: tuple[Seat, ...], batch: int, device: torch.device, bias: nn.Module | None, cache: Any
) -> Shift | None:
    """The move that running prefixes ask for, None when none does."""
    state = seats[0].state
    asked = {name: _asked(seats, name) for name in state.serving}
    if not any(asked.values()):
        return None
    past = caches.length(cache)
    route = state.rows
    if route is None:
        total = sum(asked.values())
        return Shift(torch.full((batch,), total, device=device), total, bias, past)
    index = route.fit(batch, None).to(device)
    each = torch.tensor([*(asked[name] for name in route.names), 0], device=device)  # -1: the last entry
    return Shift(each[index], max(asked.values()), bias, past)


def shifts(seat: Seat) -> bool:
    """Whether any prefix at an attention module asks for a move."""
    return any(_asked((seat,), name) for name in seat.at(Port.ATTENTION))


def _asked(seats: tuple[Seat, ...], name: str) -> int:
    for seat in seats:
        found = sum(
            getattr(graft.module, "shift_positions", 0) for graft in seat.at(Port.ATTENTION).get(name, ())
        )
        if found:
            return found
    return 0
