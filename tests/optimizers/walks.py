"""Parameters, gradients that depend on the step alone, and walks along them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def parameter(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))


def gradient(p: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def walk(optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps whose gradients depend on the step alone."""
    for step in steps:
        for group in optimizer.param_groups:
            for number, p in enumerate(group["params"]):
                p.grad = gradient(p, 10 * step + number)
        optimizer.step()
