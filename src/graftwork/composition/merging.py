"""Ways to make one change of a weight out of several, on the changes themselves. Pure functions.

n changes D_i (O, I) stacked as (n, ..., O, I), weights w_i (n,), all float64
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def linear(changes: Tensor, weights: Tensor) -> Tensor:
    """sum w_i D_i (task arithmetic, Ilharco et al. 2023, arXiv:2212.04089)."""
    return torch.tensordot(weights, changes, dims=1)


def magnitude_pruned(changes: Tensor, weights: Tensor, density: float) -> Tensor:
    """The linear sum of what is left when each change keeps its largest values."""
    return linear(largest(changes, density), weights)


def ties(changes: Tensor, weights: Tensor, density: float) -> Tensor:
    """Trim, elect a sign, average who agrees (Yadav et al. 2023, arXiv:2306.01708).

    The election is held among the weighted changes, so that a subtracted adapter votes as it counts.
    """
    return agreeing(_weighted(largest(changes, density), weights))


def dare(changes: Tensor, weights: Tensor, density: float, generator: Generator) -> Tensor:
    """The linear sum of what is left when values are dropped at random and the rest is divided by `density`
    (Yu et al. 2023, arXiv:2311.03099)."""
    return linear(dropped(changes, density, generator), weights)


def dare_ties(changes: Tensor, weights: Tensor, density: float, generator: Generator) -> Tensor:
    """As `dare`, with the sign election and mean of `ties` in place of the sum."""
    return agreeing(_weighted(dropped(changes, density, generator), weights))


def largest(changes: Tensor, density: float) -> Tensor:
    """Each change with only its int(density * values) largest values by magnitude."""
    flat = changes.flatten(1)
    kept = flat.abs().topk(int(density * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat).scatter(1, kept, flat.gather(1, kept)).view_as(changes)


def dropped(changes: Tensor, density: float, generator: Generator) -> Tensor:
    """Each value kept with probability `density` and divided by it, else 0."""
    kept = torch.stack(
        [torch.bernoulli(torch.full_like(change, density), generator=generator) for change in changes]
    )
    return changes * kept / density


def agreeing(changes: Tensor) -> Tensor:
    """Value by value, the mean of those that have the sign of their sum (a sum of 0 counts as positive)."""
    elected = torch.where(changes.sum(0) >= 0, 1.0, -1.0)
    agree = changes.sign() == elected
    return (changes * agree).sum(0) / agree.sum(0).clamp_min(1)


def _weighted(changes: Tensor, weights: Tensor) -> Tensor:
    return changes * weights.view(-1, *(1 for _ in changes.shape[1:]))
