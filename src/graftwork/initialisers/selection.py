"""Which input units of a matrix train: drawn, or by how large weights, activations or gradients are.

O, I output and input channels; a unit is so many neighbouring input channels
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from graftwork.engine.modules import planned
from graftwork.initialisers import matrices
from graftwork.initialisers.statistics import InputPower, WeightGradient
from graftwork.reference.site import Site

Selection = Literal["random", "weight", "activation", "product", "gradient"]
Keep = Literal["largest", "smallest"]
READS: Mapping[str, type[InputPower] | type[WeightGradient]] = {
    "activation": InputPower,
    "product": InputPower,
    "gradient": WeightGradient,
}


def drawn(site: Site, units: int, count: int, seed: int) -> Tensor:
    """`count` numbers of `units`, (count,); each site draws its own; zeros where modules are only counted."""
    if planned():
        return torch.zeros(count, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed + zlib.crc32(site.key.encode()))
    return torch.randperm(units, generator=generator)[:count].to(site.device)


def ranked(site: Site, units: int, count: int, selection: Selection, keep: Keep) -> Tensor:
    """The units of largest or smallest norm, (count,); zeros where modules are only counted.

    The norm is that of a unit's columns of the weight, of its activations over the calibration data, of both
    multiplied, or of its columns of the gradient (Yang et al. 2024, arXiv:2412.06289).
    """
    if planned() or (selection in READS and site.statistic is None):
        return torch.zeros(count, dtype=torch.int64)
    squares = _squares(site, selection).unflatten(-1, (units, -1)).sum(-1).prod(0)
    return squares.topk(count, largest=keep == "largest").indices


def _squares(site: Site, selection: Selection) -> Tensor:
    """Squared norms of the input channels, (1, I), or (2, I) where two are multiplied."""
    found = []
    if selection in ("weight", "product"):
        assert site.matrix is not None
        found.append(matrices.finite(site.matrix(), f"{site.key}: its weight").square().sum(0))
    if isinstance(site.statistic, InputPower | WeightGradient):
        assert site.statistic.total is not None
        total = site.statistic.total
        found.append(total.square().sum(0) if site.statistic.of_gradient else total)
    return torch.stack(found)
