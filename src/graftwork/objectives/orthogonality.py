"""Orthonormal factors (KaSA, Wang et al. 2024, arXiv:2412.06071, L3).

    sum over matrices of ||upᵀ up - I||_F + ||down downᵀ - I||_F,  up (O, R), down (R, I)

Plain norms, not squared. KaSA's code takes the large Gram matrices, O x O and I x I, which no thin factor makes the
identity: that norm is sqrt(f² + O - R) where f is the one above, so its minimiser is the same and its gradient
fades with f.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.errors import NothingMatches
from graftwork.objectives.adapted import kinds, learned
from graftwork.objectives.base import Context, Objective, wide


@dataclass(frozen=True, kw_only=True)
class Orthogonality(Objective):
    """For techniques whose modules train thin factors `down` (..., R, I) and `up` (..., O, R).

    Args:
        official: the norm of KaSA's code instead of its paper's.
        averaged: divide by the number of adapted matrices, as KaSA's code does; its paper sums.
    """

    reads_logits = False

    official: bool = False
    averaged: bool = False

    def __call__(self, context: Context) -> Tensor:
        pairs = [(learned(module, "up"), learned(module, "down")) for module in context.modules]
        found = [(up, down.mT) for up, down in pairs if up is not None and down is not None]
        if not found:
            raise NothingMatches(
                f"{self.name} found no trainable factors `down` and `up` in the adapters that run "
                f"({kinds(context.modules)}); it is for low-rank techniques"
            )
        total = torch.stack([self._departure(factor) for pair in found for factor in pair]).sum()
        return total / sum(up.shape[:-2].numel() for up, _ in found) if self.averaged else total

    def _departure(self, factor: Tensor) -> Tensor:
        norms = departure_official(wide(factor)) if self.official else departure(wide(factor))
        return norms.sum()


def departure(factor: Tensor) -> Tensor:
    """||FᵀF - I||_F of factors (..., N, R), over the leading axes; its gradient is 0 where it is 0."""
    gram = factor.mT @ factor
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.vector_norm(gram - identity, dim=(-2, -1))


def departure_official(factor: Tensor) -> Tensor:
    """||FFᵀ - I||_F of factors (..., N, R), without the N x N matrix where N is the larger side."""
    tall, narrow = factor.shape[-2:]
    if tall < narrow:
        return departure(factor.mT)
    small = departure(factor)
    floor = torch.full_like(small, math.sqrt(tall - narrow))
    return torch.linalg.vector_norm(torch.stack((small, floor)), dim=0)
