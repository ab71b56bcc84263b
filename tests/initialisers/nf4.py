"""NF4 in plain torch (Dettmers et al. 2023, arXiv:2305.14314): the reference for what starts from its errors."""

from __future__ import annotations

import torch
from torch import Tensor

BELOW = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500)
ABOVE = (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)
CODES = torch.tensor([*BELOW, 0.0, *ABOVE])


def quantiles() -> Tensor:
    """The sixteen values by their definition: quantiles of a normal, scaled to [-1, 1], with an exact 0."""
    edge, normal = 0.9677083, torch.distributions.Normal(0.0, 1.0)
    upper = normal.icdf(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    lower = -normal.icdf(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    found = torch.cat([lower, torch.zeros(1, dtype=torch.float64), upper]).sort().values
    return (found / found.max()).float()


def rounded(weight: Tensor, block: int = 64) -> Tensor:
    """The weight as NF4 holds it: blocks of neighbours in storage order, each scaled by its largest magnitude."""
    blocks = weight.flatten().view(-1, block)
    scale = blocks.abs().amax(1, keepdim=True)
    codes = CODES.to(weight)
    nearest = (blocks / scale).unsqueeze(-1).sub(codes).abs().argmin(-1)
    return (codes[nearest] * scale).view(weight.shape)
