"""Matrices to start from, and decompositions in fp32 or better: the same weight gives the same."""

from __future__ import annotations

import torch
from torch import Tensor

from graftwork.engine.spectral import leading_triplets
from graftwork.errors import BadOption
from graftwork.reference.site import Site

_SPARE, _ROUNDS = 32, 8


def zeros(site: Site, rows: int, columns: int) -> Tensor:
    """Zeros (..., rows, columns)."""
    return torch.zeros(*site.batch, rows, columns)


def normal(site: Site, rows: int, columns: int) -> Tensor:
    """Standard normal values (..., rows, columns)."""
    return torch.randn(*site.batch, rows, columns)


def top_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U (..., O, R), S (..., R), V (..., I, R)), largest first.

    By randomised subspace iteration, or exactly where the rank is no small part of the matrix.
    """
    smaller = min(matrix.shape[-2:])
    if 4 * (rank + _SPARE) > smaller:
        left, values, rows = torch.linalg.svd(matrix, full_matrices=False)
        right = rows.mT
    else:
        left, values, right = leading_triplets(matrix, rank + _SPARE, _ROUNDS)
    return left[..., :rank], values[..., :rank], right[..., :rank]


def bottom_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V) of the `rank` smallest of min(O, I) singular values, descending; exact."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    first = values.shape[-1] - rank
    return left[..., first:], values[..., first:], right.mT[..., first:]


def qr(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first `rank` columns (..., O, R) and rows (..., R, I) of the reduced QR decomposition."""
    q, triangle = torch.linalg.qr(matrix)
    return q[..., :rank], triangle[..., :rank, :]


def finite(matrix: Tensor, what: str) -> Tensor:
    """The matrix, refused where a value is infinite or not a number."""
    if not bool(torch.isfinite(matrix).all()):
        raise BadOption(f"{what} holds values that are infinite or not a number, so it cannot be decomposed")
    return matrix
