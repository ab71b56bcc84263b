"""Losses over many batches and processes: the training loss's parts between two records, an evaluation's mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor


class LossParts:
    """Each part's mean over the steps in which it counted, slices of a batch by their share.

    Args:
        names: of the objectives.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = ("task", *names)
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, parts: Mapping[str, Tensor], share: Tensor) -> None:
        """What one slice found; `share` is its part of the batch's counted labels."""
        for name, value in parts.items():
            entry = torch.stack((value.float() * share, share.float()))
            self._sums.setdefault(name, []).append(entry)

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """`loss_task`, `loss_consistency`, ... over all processes, then start anew; every process calls it."""
        none = torch.zeros(2, device=accelerator.device)
        sums = torch.stack([sum(self._sums.get(name, []), none) for name in self._names])
        self._sums = {}
        found = accelerator.reduce(sums, reduction="sum").tolist()
        return {
            f"loss_{name.replace('-', '_')}": total / share
            for name, (total, share) in zip(self._names, found, strict=True)
            if share
        }


class EvaluationLoss:
    """The mean loss of an evaluation's counted labels, however they are cut into batches and processes."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, loss: Tensor, counted: int) -> None:
        """A batch's mean loss over its `counted` labels."""
        if counted:
            self._sums.append(torch.stack((loss.float() * counted, loss.new_tensor(counted).float())))

    def mean(self, accelerator: Accelerator) -> float | None:
        """Over all processes, None where nothing was counted; every process calls it."""
        none = torch.zeros(2, device=accelerator.device)
        total, counted = accelerator.reduce(sum(self._sums, none), reduction="sum").tolist()
        return total / counted if counted else None
