"""Leading singular directions of large matrices by randomised subspace iteration (Halko et al. 2011, arXiv:0909.4061,
algorithms 4.4 and 5.1).

    (..., O, I) a matrix, K the width of the subspace

The sketch comes from a generator of its own: the same matrix and seed give the same directions on every process, and
the caller's random numbers stay as they were.
"""

from __future__ import annotations

import torch
from torch import Tensor


def leading_range(matrix: Tensor, width: int, rounds: int, seed: int = 0) -> Tensor:
    """An orthonormal basis (..., O, K) of about the leading left singular directions; K is `width`, at most min(O, I).

    Args:
        rounds: power iterations; each is a product with the matrix and one with its transpose, both made orthonormal.
    """
    count = min(width, *matrix.shape[-2:])
    generator = torch.Generator(matrix.device).manual_seed(seed)
    shape = (*matrix.shape[:-2], matrix.shape[-1], count)
    sketch = torch.randn(shape, generator=generator, device=matrix.device, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ sketch)[0]
    for _ in range(rounds):
        other = torch.linalg.qr(matrix.mT @ basis)[0]
        basis = torch.linalg.qr(matrix @ other)[0]
    return basis


def leading_triplets(matrix: Tensor, width: int, rounds: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(U (..., O, K), S (..., K), V (..., I, K)), largest first; the last few of them are the least exact."""
    basis = leading_range(matrix, width, rounds, seed)
    left, values, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ left, values, right.mT
