"""Dropout without a stored mask: the mask is a hash of a seed, made anew wherever it is needed.

The seed comes from torch's CPU generator, so `torch.manual_seed` and activation recomputation reproduce it,
and the same seed gives the same mask on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.errors import BadOption

_LEVELS = 256
_LOW = 2**32 - 1
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)  # odd multipliers of splitmix64, as int64


@dataclass(frozen=True)
class Drop:
    """One reproducible mask: `dropped` of the 256 values of a random byte drop an element.

    A byte for each element, so the probability is a multiple of 1/256; `gain` undoes exactly that rate.
    """

    seed: int
    dropped: int

    @classmethod
    def draw(cls, dropout: float) -> Drop | None:
        """A new mask of about that probability; None where it rounds to zero."""
        dropped = round(dropout * _LEVELS)
        if not 0 <= dropped < _LEVELS:
            raise BadOption(f"dropout={dropout}: give a probability from 0 to below {1 - 0.5 / _LEVELS:.4f}")
        return cls(int(torch.randint(2**62, ())), dropped) if dropped else None

    @property
    def gain(self) -> float:
        """1 / (1 - rate) for the rounded rate."""
        return _LEVELS / (_LEVELS - self.dropped)

    def apply(self, x: Tensor) -> Tensor:
        """x with its dropped elements at zero, not rescaled."""
        words = _hash(self.seed, (x.numel() + 7) // 8, x.device)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.dropped
        return torch.where(kept, x, 0.0)


def _hash(seed: int, count: int, device: torch.device) -> Tensor:
    """`count` 64-bit words: counters from `seed` on, through two rounds of multiply and shift-xor."""
    words = torch.arange(seed, seed + count, dtype=torch.int64, device=device)
    for factor in _MIX:
        words.mul_(factor)
        words.bitwise_xor_(
            (words >> 32).bitwise_and_(_LOW)
        )  # the shift of a signed word copies its sign: cut it off
    return words
