"""Consistency: stay near the model without its adapters (BA-LoRA, Chang et al. 2024, arXiv:2408.04556).

T² KL(softmax(teacher / T) || softmax(student / T)), mean over examples or counted tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor
from torch.nn import functional

from graftwork.objectives.base import Context, Objective
from graftwork.reference.technique import Above


@dataclass(frozen=True, kw_only=True)
class Consistency(Objective):
    """Against drift from what the base knows; costs one forward of the base per batch.

    Args:
        temperature: softens both distributions; T² keeps the gradient's size.
    """

    temperature: Annotated[float, Above(0)] = 1.0

    def __call__(self, context: Context) -> Tensor:
        return divergence(context.rows, context.teacher_rows, self.temperature)


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(teacher || student) of logits (M, D), mean over the M rows; 0 without rows."""
    own = functional.log_softmax(student / temperature, dim=-1)
    wanted = functional.log_softmax(teacher / temperature, dim=-1)
    total = functional.kl_div(own, wanted, reduction="sum", log_target=True)
    return temperature**2 * total / max(len(student), 1)
