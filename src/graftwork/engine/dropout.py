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
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
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
        return cls(_seed(), dropped) if dropped else None

    @property
    def gain(self) -> float:
        """1 / (1 - rate) for the rounded rate."""
        return _LEVELS / (_LEVELS - self.dropped)

    def apply(self, x: Tensor) -> Tensor:
        """x with its dropped elements at zero, not rescaled."""
        kept = self._kept(x.numel(), x.device).view(x.shape)
        if torch.is_grad_enabled() and x.requires_grad:
            return torch.where(kept.bool(), x, 0.0)
        bits = _BITS[x.element_size()]  # a third of the time of a comparison and a choice
        return kept.to(bits).bitwise_and_(x.view(bits)).view(x.dtype)

    def _kept(self, count: int, device: torch.device) -> Tensor:
        """-1 (all bits set) where an element stays, else 0: the sign of byte - limit, without overflow."""
        random = _hash(self.seed, (count + 7) // 8, device).view(torch.int8)[:count]
        limit = _LEVELS // 2 - self.dropped  # signed bytes below it stay
        random.clamp_(max(-128, limit - 128), min(127, limit + 127))
        return random.sub_(limit).bitwise_right_shift_(7)


def _seed() -> int:
    """A number from torch's CPU generator; 0 where tensors have shapes and no values (fake tensors)."""
    drawn = torch.randint(2**62, ())
    return int(drawn) if type(drawn) is Tensor else 0


def _hash(seed: int, count: int, device: torch.device) -> Tensor:
    """`count` 64-bit words: counters from `seed` on, through two rounds of multiply and shift-xor."""
    words = torch.arange(seed, seed + count, dtype=torch.int64, device=device)
    for factor in _MIX:
        words.mul_(factor)
        words.bitwise_xor_((words >> 32).bitwise_and_(_LOW))  # a shift copies the sign: cut it off
    return words
