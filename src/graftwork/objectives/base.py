"""The contract of an objective: a frozen dataclass with a weight, called with a context, answering a scalar.

M counted rows, D classes or tokens of the vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from graftwork.engine.assigned import Assigned
from graftwork.errors import BadOption
from graftwork.objectives.rows import counted_rows
from graftwork.reference.technique import AtLeast, check_options, kebab

Schedule = Literal["constant", "cosine", "two-phase"]

FLOOR = 0.1  # what the cosine schedule ends at
QUIET, RAMP = 0.2, 0.05  # shares of all steps, two-phase schedule


@dataclass(frozen=True, kw_only=True)
class Context:
    """What an objective may look at.

    Attributes:
        logits: of the model with its adapters: (N, D) one row per example, (B, T, D) one per token; None where
            the outputs have none.
        labels: as the batch has them.
        shifted: position t predicts the label at t + 1.
        teach: gives the logits of the model without its adapters.
        modules: of the adapters that run.
        routers: what each router over experts decided in the last forward; empty where no term reads them.
        real: (B, T) which tokens of the stack that a site belongs to count, by its key; None: all.
        progress: share of the steps done, in [0, 1].
    """

    logits: Tensor | None
    labels: Tensor | None
    shifted: bool
    teach: Callable[[], Tensor | None]
    modules: tuple[nn.Module, ...]
    progress: float
    routers: tuple[Assigned, ...] = ()
    real: Callable[[str], Tensor | None] = lambda key: None

    @cached_property
    def rows(self) -> Tensor:
        """(M, D) logits of the rows that count, in fp32 (float64 stays)."""
        return counted_rows(self.logits, self.labels, self.shifted)

    @cached_property
    def teacher_rows(self) -> Tensor:
        """(M, D) the teacher's logits of the same rows; the teacher runs when this is first asked for."""
        return counted_rows(self.teach(), self.labels, self.shifted)

    @property
    def per_example(self) -> bool:
        """One row per example (classification), not per token (generation, tagging)."""
        return self.logits is not None and self.logits.ndim == 2


@dataclass(frozen=True, kw_only=True)
class Objective:
    """An extra loss term.

    Args:
        weight: its factor in the loss; at 0 it is not computed.
        schedule: of the weight over the run. "cosine" falls to a tenth; "two-phase" is 0 for the first 20 % of
            the steps, rises over 5 %, then stays (BA-LoRA, arXiv:2408.04556, its code).
    """

    name: ClassVar[str] = "objective"
    reads_logits: ClassVar[bool] = True
    reads_routers: ClassVar[bool] = False

    weight: Annotated[float, AtLeast(0)]
    schedule: Schedule = "constant"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = kebab(cls.__name__)

    def __post_init__(self) -> None:
        check_options(self)  # type: ignore[arg-type]

    def __call__(self, context: Context) -> Tensor:
        """The term without its weight: a scalar in fp32 (float64 for float64 tensors)."""
        raise NotImplementedError

    def weight_at(self, progress: float) -> float:
        """The weight after this share of the steps."""
        return self.weight * factor(self.schedule, progress)


def factor(schedule: Schedule, progress: float) -> float:
    """What a schedule makes of a weight; `progress` in [0, 1]."""
    if not 0 <= progress <= 1:
        raise BadOption(f"progress={progress!r} is no share of a run: pass step / total steps, in [0, 1]")
    if schedule == "cosine":
        return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "two-phase":
        return min(max((progress - QUIET) / RAMP, 0.0), 1.0)
    return 1.0


def wide(tensor: Tensor) -> Tensor:
    """At least fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
