"""Spectral concentration of the batch's logits, against fitting noise (BA-LoRA, arXiv:2408.04556).

    - (s_1 + ... + s_k) / (s_1 + ... + s_min(M, D))   nuclear
    - (s_1 + ... + s_k) / ||Z||_F                     Frobenius

s the singular values of the (M, D) logits, uncentred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from graftwork.engine.spectral import leading_range
from graftwork.errors import BadOption
from graftwork.objectives.base import Context, Objective
from graftwork.reference.technique import AtLeast

WIDE = 4096  # columns above which singular values are estimated
SPARE, ROUNDS = 5, 2  # directions beyond k, power iterations
TINY = 1e-8


@dataclass(frozen=True, kw_only=True)
class SpectralConcentration(Objective):
    """Gather the logits of a batch in few directions.

    Args:
        components: k. With the nuclear norm it must stay below the number of classes: the ratio of all
            singular values to all of them is 1 whatever the model does.
        norm: None takes the nuclear norm where there is one row per example, Frobenius where there is one per
            token.
    """

    components: Annotated[int, AtLeast(1)] = 1
    norm: Literal["nuclear", "frobenius"] | None = None

    def __call__(self, context: Context) -> Tensor:
        rows = context.rows
        if (self.norm or ("nuclear" if context.per_example else "frobenius")) == "frobenius":
            return frobenius_ratio(rows, self.components)
        if self.components >= rows.shape[1]:
            raise BadOption(
                f"{self.name}: components={self.components} of logits with {rows.shape[1]} classes is all of "
                f"them, and the term constant; take at most {rows.shape[1] - 1}, or norm='frobenius'"
            )
        return nuclear_ratio(rows, self.components)


def nuclear_ratio(rows: Tensor, components: int) -> Tensor:
    """In [-1, -k / min(M, D)] for rows (M, D); 0 below two rows or where all are zero."""
    if _empty(rows):
        return rows.new_zeros(())
    values = torch.linalg.svdvals(rows)
    return -values[:components].sum() / values.sum()


def frobenius_ratio(rows: Tensor, components: int, widest: int = WIDE) -> Tensor:
    """In [-sqrt k, 0) for rows (M, D); 0 below two rows or where all are zero.

    Singular values are exact up to `widest` columns, beyond that those of a projection (`leading`).
    """
    if _empty(rows):
        return rows.new_zeros(())
    exact = rows.shape[1] <= widest
    values = torch.linalg.svdvals(rows) if exact else leading(rows, components + SPARE)
    return -values[:components].sum() / torch.linalg.vector_norm(rows)


def leading(rows: Tensor, count: int) -> Tensor:
    """About the `count` largest singular values of (M, D).

    The basis is held constant in backward: to first order a singular value changes by the change of the matrix
    between its own vectors.
    """
    with torch.no_grad():
        basis = leading_range(rows, count, ROUNDS)
    return torch.linalg.svdvals(basis.mT @ rows)


def _empty(rows: Tensor) -> bool:
    return len(rows) < 2 or bool(torch.linalg.vector_norm(rows.detach()) < TINY)
