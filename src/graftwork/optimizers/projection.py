"""The low-rank space in which a matrix's gradient is followed (GaLore, arXiv:2403.03507, section 4.2).

A gradient G (n, m) is projected along its shorter side: G Q with Q (m, r) where n >= m, else P^T G with
P (n, r). Both are called the basis here: shape (shorter side, rank), orthonormal columns.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from graftwork.engine.spectral import leading_triplets
from graftwork.errors import StateError

Svd = Literal["exact", "randomized"]
SVDS: tuple[str, ...] = get_args(Svd)
OVERSAMPLING = 8
POWER_ITERATIONS = 2


def leading_basis(gradient: Tensor, rank: int, svd: Svd, seed: int) -> Tensor:
    """The `rank` leading singular vectors of the shorter side: (min(n, m), rank), of the gradient's dtype.

    Args:
        gradient: (n, m), float32 or float64.
        svd: "exact", or "randomized": subspace iteration, for large matrices.
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
    if svd == "exact":
        vectors = torch.linalg.svd(wide, full_matrices=False)[0]
    else:
        vectors = leading_triplets(wide, rank + OVERSAMPLING, POWER_ITERATIONS, seed)[0]
    return vectors[:, :rank].clone(memory_format=torch.contiguous_format)  # a view would keep all of them


def project(gradient: Tensor, basis: Tensor) -> Tensor:
    """(n, m) -> (n, rank) where n >= m, else (rank, m)."""
    return gradient @ basis if gradient.shape[0] >= gradient.shape[1] else basis.mT @ gradient


def project_back(low: Tensor, basis: Tensor, shape: torch.Size) -> Tensor:
    """The transpose of `project`: back to `shape` (n, m)."""
    return low @ basis.mT if shape[0] >= shape[1] else basis @ low
