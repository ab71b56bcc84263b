"""What an operation answers beneath one module of the stack, for modules that run without a dense weight.

I, O input and output channels, R rank
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from graftwork.engine.factors import Factors


@dataclass(frozen=True)
class Below:
    """The operation with everything beneath a module in the stack.

    Attributes:
        product: the answer (..., O) to x (..., I), bias included.
        with_low_rank: the same plus low-rank deltas, in one function where that is possible.
        matrix: reads the (O, I) matrix it multiplies by, without the module's own change; a view of the stored one
            where nothing lies beneath.
        bias: what the answer holds beside the product, (O,), or None.
        bare: nothing lies beneath but torch's own linear layer, which keeps no answer of its own for backward.
    """

    product: Callable[[Tensor], Tensor]
    with_low_rank: Callable[[Tensor, tuple[Factors, ...]], Tensor]
    matrix: Callable[[], Tensor]
    bias: Tensor | None
    bare: bool

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x)

    def plus(self, x: Tensor, delta: Tensor) -> Tensor:
        """The answer to x with `delta` added; in place where the answer is fresh from the host."""
        y = self.product(x)
        delta = delta.to(y.dtype)
        return y.add_(delta) if self.bare else y + delta

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
        """The answer to x plus scale * (drop(x) downᵀ) upᵀ."""
        return self.with_low_rank(x, (Factors(down, up, scale, dropout),))
