"""Frozen random tensors that a seed stands for: adapter files hold the seed, and loading draws them again.

They are drawn on the CPU, whose generator gives the same values whatever device the model is on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn


def generator(seed: int) -> Generator:
    """A CPU generator at its start."""
    return Generator("cpu").manual_seed(seed)


def spread(bound: float, shape: tuple[int, ...], source: Generator) -> Tensor:
    """Uniform in +-bound, on the CPU."""
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=source)


class Frozen(nn.Module):
    """Named tensors that never train and are in no file, for `Technique.shared`."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            counted = tensor.is_meta  # modules are only being counted
            self.register_buffer(name, tensor if counted else tensor.to(device), persistent=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(name)
