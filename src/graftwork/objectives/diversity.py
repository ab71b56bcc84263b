"""Diversity: against collapse onto few answers (BA-LoRA, Chang et al. 2024, arXiv:2408.04556).

covariance   (1/D) sum of C_ij² over i != j,  C = Zcᵀ Zc / (M - 1),  Zc the logits less their column means
entropy      - mean entropy of the softmax over the K largest logits of each row
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor
from torch.nn import functional

from graftwork.objectives.base import Context, Objective
from graftwork.reference.technique import AtLeast


@dataclass(frozen=True, kw_only=True)
class Diversity(Objective):
    """Decorrelate the classes, or keep the likeliest tokens apart from certainty.

    Args:
        form: None takes the covariance where there is one row per example, the entropy where there is one per
            token.
        largest: K of the entropy; None is the whole vocabulary.
    """

    form: Literal["covariance", "entropy"] | None = None
    largest: Annotated[int | None, AtLeast(2)] = 20

    def __call__(self, context: Context) -> Tensor:
        form = self.form or ("covariance" if context.per_example else "entropy")
        if form == "covariance":
            return correlation(context.rows)
        return negative_entropy(context.rows, self.largest)


def correlation(rows: Tensor) -> Tensor:
    """Squared covariances between different columns of (M, D), over D; 0 below two rows."""
    if len(rows) < 2:
        return rows.new_zeros(())
    centred = rows - rows.mean(0)
    covariance = centred.mT @ centred / (len(rows) - 1)
    apart = covariance - covariance.diagonal().diag()
    return apart.square().sum() / rows.shape[1]


def negative_entropy(rows: Tensor, largest: int | None = None) -> Tensor:
    """- mean entropy of the softmax over the `largest` logits of each row of (M, D); 0 without rows."""
    if largest is not None and largest < rows.shape[1]:
        rows = rows.topk(largest, dim=-1).values
    logs = functional.log_softmax(rows, dim=-1)
    return (logs.exp() * logs).sum() / max(len(rows), 1)
