"""What a continual learner must do: learn one task at a time, say what it predicts, hand over its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.continual.features import Pooling, check_pooling, features, queries
from graftwork.continual.samples import Samples
from graftwork.engine.adapter import Adapter
from graftwork.reference.technique import Technique

HEAD = "head."


class Method(ABC):
    """A learner over a frozen model and one technique.

    `learn` calls, task after task: `begin`, then `loss` for each batch, then `finish`. A task's data are given
    to these calls only, and nothing of them is kept but what `state` returns.

    Args:
        model: a bare model (without a head), whose forward takes the samples' inputs by name.
        technique: what is grafted on it.
        pooling: which positions of the output are the features: "first" (CLS), "mean", "last".
    """

    def __init__(self, model: nn.Module, technique: Technique, *, pooling: Pooling = "first") -> None:
        check_pooling(pooling)
        self.model, self.technique, self.pooling = model, technique, pooling

    @abstractmethod
    def begin(self, number: int, classes: Sequence[int], train: Samples) -> None:
        """Make what task `number` trains."""

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What the task that was begun trains."""

    @abstractmethod
    def loss(self, batch: Samples, numbers: Tensor) -> Tensor:
        """The training loss of a batch; `numbers` (B,) are its rows in the data that `begin` was given."""

    @abstractmethod
    def finish(self) -> None:
        """Close the task that was begun."""

    @abstractmethod
    def predict(self, samples: Samples) -> Tensor:
        """Predicted classes (B,), without knowing the task; labels are not looked at."""

    @abstractmethod
    def state(self, number: int) -> dict[str, Tensor]:
        """What is kept once task `number` is finished; what earlier tasks' states hold need not be in it."""

    @abstractmethod
    def restore(self, number: int, classes: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state(number)` gave; called for 0, 1, ... in order, on a fresh learner."""

    def settings(self) -> dict[str, Any]:
        """All options as plain values: two learners with the same settings learn the same."""
        technique = {"name": self.technique.name, **self.technique.options()}
        return {"method": type(self).__name__, "technique": technique, "pooling": self.pooling}

    def _features(self, samples: Samples) -> Tensor:
        return features(self.model, samples.inputs, self.pooling)

    def _queries(self, samples: Samples) -> Tensor:
        return queries(self.model, samples, self.pooling)


def within(classes: Sequence[int], labels: Tensor) -> Tensor:
    """Places (B,) of class numbers among a task's own classes."""
    return (labels[:, None] == torch.tensor(classes, device=labels.device)).int().argmax(1)


def masked_loss(logits: Tensor, labels: Tensor, classes: Sequence[int] | None) -> Tensor:
    """Cross-entropy of logits (B, C) over some classes only (None: all): others are set to minus infinity."""
    if classes is None:
        return functional.cross_entropy(logits, labels)
    others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    others[list(classes)] = False
    return functional.cross_entropy(logits.masked_fill(others, -torch.inf), labels)


def whole_state(adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor of an adapter's modules under its file name, as `Adapter.load_tensors` takes them."""
    return {
        adapter.tensor_name(place, name): tensor.clone()
        for place in adapter.placed
        for name, tensor in place.graft.module.state_dict().items()
    }


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under names that begin with `prefix`."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def head(width: int, classes: int, model: nn.Module) -> nn.Linear:
    """A fresh linear head where the model is."""
    parameter = next(model.parameters())
    return nn.Linear(width, classes, device=parameter.device, dtype=parameter.dtype)


def frozen(parameters: Iterable[nn.Parameter]) -> None:
    """Stop training these."""
    for parameter in parameters:
        parameter.requires_grad_(False)
