"""What a technique asks of calibration data: a statistic of one site, gathered before its module is built."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor


class Statistic:
    """Fed batch by batch while the bare model runs; `Technique.build` finds it at `Site.statistic`.

    Attributes:
        of_gradient: it is given gradients of the weight, else the signals that the weight multiplies.
    """

    of_gradient: ClassVar[bool] = False

    def see(self, values: Tensor) -> None:
        """Take in one batch, finite, in fp32 or better.

        Args:
            values: signals (N, I), a row for each time the matrix is applied; or the gradient (..., O, I) of the loss.
        """
        raise NotImplementedError

    @property
    def settled(self) -> bool:
        """Whether more batches would change little."""
        return False
