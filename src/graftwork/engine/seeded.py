"""Frozen random tensors that a seed stands for: adapter files hold the seed, and loading draws them again.

They are drawn on the CPU, whose generator gives the same values whatever device the model is on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor, nn

from graftwork.reference.site import Site


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


def frozen_for(sites: Sequence[Site], draw: Callable[[int, int], Mapping[str, Tensor]]) -> Frozen | None:
    """Tensors drawn once for all sites, `draw(width_in, width_out)` at the largest widths; None for no site."""
    if not sites:
        return None
    widest = max(site.width_in for site in sites), max(site.width_out for site in sites)
    return Frozen(draw(*widest), sites[0].device)
