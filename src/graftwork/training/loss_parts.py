"""The parts of the loss between two records of the log."""

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
