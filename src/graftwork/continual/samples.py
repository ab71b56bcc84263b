"""Labelled samples of any modality as tensors: what a model's forward is called with, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from graftwork.errors import BadData

_MASK = "attention_mask"


class Examples(Protocol):
    """Examples by number, each a mapping from names to values."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Samples:
    """Samples with one class each.

    Args:
        inputs: argument of the model's forward -> tensor (n, ...): pixels, token ids and mask, series.
        labels: (n,) class numbers, the same class the same number in every task.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def __post_init__(self) -> None:
        sizes = {name: len(values) for name, values in self.inputs.items()}
        if not sizes or set(sizes.values()) != {len(self.labels)}:
            raise BadData(f"samples differ in number: labels {len(self.labels)}, inputs {sizes or 'none'}")
        if self.labels.dim() != 1 or self.labels.is_floating_point() or (self.labels < 0).any():
            raise BadData("labels are class numbers from 0: an integer tensor of shape (n,)")

    @classmethod
    def of(cls, dataset: Examples, collator: Callable[[Any], Mapping[str, Tensor]]) -> Samples:
        """From encoded examples with `labels` and the collator of their task (graftwork.tasks)."""
        batch = dict(collator([dataset[n] for n in range(len(dataset))]))
        labels = batch.pop("labels")
        return cls(batch, labels.long())

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """All samples of several sets, in order. Raises BadData where names or shapes differ."""
        kinds = {tuple((name, tuple(x.shape[1:])) for name, x in sorted(p.inputs.items())) for p in parts}
        if len(kinds) != 1:
            raise BadData(f"samples of different shapes cannot be joined: {sorted(kinds)}; pad them alike")
        inputs = {name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs}
        return cls(inputs, torch.cat([part.labels for part in parts]))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> tuple[int, ...]:
        """The classes that occur, sorted."""
        return tuple(sorted(set(self.labels.tolist())))

    def take(self, numbers: Tensor) -> Samples:
        """The samples with these numbers (k,), in this order; columns that are padding in all of them go."""
        chosen = {name: values.index_select(0, numbers) for name, values in self.inputs.items()}
        return Samples(_trimmed(chosen), self.labels.index_select(0, numbers))

    def to(self, device: torch.device) -> Samples:
        """The same samples on a device."""
        inputs = {name: values.to(device) for name, values in self.inputs.items()}
        return Samples(inputs, self.labels.to(device))

    def of_classes(self, classes: Sequence[int]) -> Samples:
        """The samples of some classes."""
        numbers = torch.isin(self.labels, torch.tensor(classes)).nonzero().squeeze(1)
        return Samples(
            {name: values.index_select(0, numbers) for name, values in self.inputs.items()},
            self.labels.index_select(0, numbers),
        )

    def batches(self, size: int) -> Iterator[Samples]:
        """All samples in order, at most `size` at a time."""
        return (self.take(numbers) for numbers in torch.arange(len(self)).split(size))


def _trimmed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = inputs.get(_MASK)
    if mask is None or mask.dim() != 2 or not len(mask):
        return inputs
    used = mask.any(0)
    return {
        name: values[:, used] if values.shape[:2] == mask.shape else values for name, values in inputs.items()
    }
