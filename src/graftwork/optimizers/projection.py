"""The low-rank space in which a matrix's gradient is followed (GaLore, arXiv:2403.03507, section 4.2).

A gradient G (n, m) is projected along its shorter side: G Q with Q (m, r) where n >= m, else P^T G with
P (n, r). Both are called the basis here: shape (shorter side, rank), orthonormal columns.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from graftwork.errors import StateError

Svd = Literal["exact", "randomized"]
SVDS: tuple[str, ...] = get_args(Svd)
OVERSAMPLING = 8
POWER_ITERATIONS = 2


def leading_basis(gradient: Tensor, rank: int, svd: Svd, seed: int) -> Tensor:
    """The `rank` leading singular vectors of the shorter side: (min(n, m), rank), of the gradient's dtype.

    Args:
        gradient: (n, m), float32 or float64.
        svd: "exact", or "randomized": range finder with power iterations (Halko et al. 2011, arXiv:0909.4061,
            algorithms 4.4 and 5.1), for large matrices.
        seed: of the random range; the same seed and gradient give the same basis on every process.

    Raises:
        StateError: the gradient is not finite.
    """
    if not gradient.isfinite().all():
        raise StateError(
            f"a gradient of shape {tuple(gradient.shape)} is not finite where its projection is to be renewed: "
            "lower the learning rate, or skip such steps as torch.amp.GradScaler does"
        )
    wide = gradient.mT if gradient.shape[0] >= gradient.shape[1] else gradient
    vectors = _left_vectors(wide) if svd == "exact" else _randomized_left_vectors(wide, rank, seed)
    return vectors[:, :rank].clone(memory_format=torch.contiguous_format)  # a view would keep all of them


def project(gradient: Tensor, basis: Tensor) -> Tensor:
    """(n, m) -> (n, rank) where n >= m, else (rank, m)."""
    return gradient @ basis if gradient.shape[0] >= gradient.shape[1] else basis.mT @ gradient


def project_back(low: Tensor, basis: Tensor, shape: torch.Size) -> Tensor:
    """The transpose of `project`: back to `shape` (n, m)."""
    return low @ basis.mT if shape[0] >= shape[1] else basis @ low


def _left_vectors(wide: Tensor) -> Tensor:
    left: Tensor = torch.linalg.svd(wide, full_matrices=False)[0]
    return left


def _randomized_left_vectors(wide: Tensor, rank: int, seed: int) -> Tensor:
    short, long = wide.shape
    width = min(rank + OVERSAMPLING, short)
    generator = torch.Generator(wide.device).manual_seed(seed)
    probe = torch.randn(long, width, generator=generator, device=wide.device, dtype=wide.dtype)
    span = torch.linalg.qr(wide @ probe)[0]
    for _ in range(POWER_ITERATIONS):
        other = torch.linalg.qr(wide.mT @ span)[0]
        span = torch.linalg.qr(wide @ other)[0]
    return span @ _left_vectors(span.mT @ wide)
