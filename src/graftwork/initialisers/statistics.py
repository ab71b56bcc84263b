"""What initialisers and selections ask of calibration data.

N rows of one batch, I, O input and output channels, K directions kept
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from graftwork.initialisers.matrices import top_singular
from graftwork.reference.statistic import Statistic


@dataclass
class InputDirections(Statistic):
    """The principal directions of the inputs, batch by batch: an incremental singular value decomposition that follows
    the mean (Ross et al. 2008, "Incremental Learning for Robust Visual Tracking").

    Attributes:
        count: K, how many directions are kept.
        tolerance: settled when each direction's cosine with the one before is at least this.
        directions: (K, I), orthonormal rows, largest variance first; fewer rows while inputs span no more.
        values: (K,) singular values of the centred inputs so far.
        variance: sum over rows and channels of the squared distance from the mean.
    """

    count: int
    tolerance: float = 0.99
    directions: Tensor | None = field(default=None, compare=False)
    values: Tensor | None = field(default=None, compare=False)
    variance: float = field(default=0.0, compare=False)
    _mean: Tensor | None = field(default=None, compare=False)
    _rows: int = field(default=0, compare=False)
    _settled: bool = field(default=False, compare=False)

    def see(self, values: Tensor) -> None:
        if self._settled or len(values) == 0:
            return
        before, mean = self.directions, values.mean(0)
        shift = mean - (mean if self._mean is None else self._mean)
        weight = self._rows * len(values) / (self._rows + len(values))
        centred = values - mean
        stack = [centred, weight**0.5 * shift.unsqueeze(0)]
        if before is not None and self.values is not None:
            stack.insert(0, self.values.unsqueeze(-1) * before)
        self._decompose(torch.cat(stack))
        self.variance += _power(centred) + weight * _power(shift)
        self._mean = mean - shift * (self._rows / (self._rows + len(values)))
        self._rows += len(values)
        self._settled = self._close_to(before)

    @property
    def settled(self) -> bool:
        return self._settled

    def explained(self) -> Tensor:
        """(K,): share of the inputs' variance along each direction."""
        assert self.values is not None
        return self.values.square() / max(self.variance, torch.finfo(torch.float32).tiny)

    def _decompose(self, matrix: Tensor) -> None:
        _, values, right = top_singular(matrix, min(self.count, *matrix.shape))
        real = values > values[0] * max(matrix.shape) * torch.finfo(values.dtype).eps
        self.directions, self.values = right.mT[real], values[real]

    def _close_to(self, before: Tensor | None) -> bool:
        if before is None or self.directions is None or len(before) != self.count:
            return False
        cosines = (before * self.directions).sum(-1).abs()
        return bool((cosines >= self.tolerance).all())


def _power(values: Tensor) -> float:
    """The sum of squares, added up in fp64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


@dataclass
class InputPower(Statistic):
    """The sum of squares of each input channel, (I,): its square root is the channel's activation norm."""

    total: Tensor | None = field(default=None, compare=False)

    def see(self, values: Tensor) -> None:
        power = values.square().sum(0)
        self.total = power if self.total is None else self.total + power


@dataclass
class WeightGradient(Statistic):
    """The gradient of the weight (..., O, I), summed over batches."""

    of_gradient: ClassVar[bool] = True
    total: Tensor | None = field(default=None, compare=False)

    def see(self, values: Tensor) -> None:
        self.total = values.clone() if self.total is None else self.total + values
