"""Matrices to start from and their decompositions, in fp32 or better; seeded, so the same weight gives the same."""

from __future__ import annotations

import torch
from torch import Tensor

from graftwork.errors import BadOption
from graftwork.reference.site import Site

_OVERSAMPLE, _ITERATIONS, _SEED = 32, 8, 0


def planned() -> bool:
    """Whether modules are only being counted: what is made now is on the meta device, and no weight may be read."""
    return torch.empty(0).is_meta


def zeros(site: Site, rows: int, columns: int) -> Tensor:
    """Zeros (..., rows, columns)."""
    return torch.zeros(*site.batch, rows, columns)


def normal(site: Site, rows: int, columns: int) -> Tensor:
    """Standard normal values (..., rows, columns)."""
    return torch.randn(*site.batch, rows, columns)


def uniform(site: Site, rows: int, columns: int, bound: float) -> Tensor:
    """Values uniform in +-bound (..., rows, columns)."""
    return torch.empty(*site.batch, rows, columns).uniform_(-bound, bound)


def top_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U (..., O, R), S (..., R), V (..., I, R)), largest first.

    By randomised subspace iteration with power steps (Halko et al. 2011, arXiv:0909.4061), or exactly where the rank
    is no small part of the matrix.
    """
    smaller = min(matrix.shape[-2:])
    if 4 * (rank + _OVERSAMPLE) > smaller:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[..., :rank], values[..., :rank], right.mT[..., :rank]
    devices = [matrix.device] if matrix.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_SEED)
        left, values, right = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLE, niter=_ITERATIONS)
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
