"""Contexts made by hand, without a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graftwork.objectives import Context

torch.set_num_threads(1)

TEACHER = torch.tensor([[2.0, 0], [0, 2], [1, 1]], dtype=torch.float64)
STUDENT = torch.tensor([[1.0, 2], [3, 4], [5, 9]], dtype=torch.float64)


def on(
    student: Tensor, teacher: Tensor | None = None, labels: Tensor | None = None, *, shifted: bool = False
) -> Context:
    """A context of these logits; every row counts unless `labels` say otherwise."""
    counted = torch.zeros(student.shape[:-1], dtype=torch.long) if labels is None else labels
    return Context(
        logits=student,
        labels=counted,
        shifted=shifted,
        teach=lambda: teacher,
        modules=(),
        progress=0.0,
    )


def of(*modules: nn.Module) -> Context:
    """A context of these adapter modules, without logits."""
    return Context(logits=None, labels=None, shifted=False, teach=lambda: None, modules=modules, progress=0.0)


class Factors(nn.Module):
    """up diag(values) down."""

    def __init__(self, up: Tensor, down: Tensor, values: Tensor | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)
        if values is not None:
            self.values = nn.Parameter(values)
