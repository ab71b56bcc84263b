"""One adapter trained on task after task: the lower bound, and on the joined scenario the upper bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.continual.features import Pooling
from graftwork.continual.method import HEAD, Method, head, masked_loss, part, prefixed, whole_state
from graftwork.continual.samples import Samples
from graftwork.engine.adapter import Adapter
from graftwork.engine.attach import attach
from graftwork.engine.verbs import adapters
from graftwork.reference.technique import Technique

_NAME, _PHI = "sequential", "adapter."


class Sequential(Method):
    """Go on training the same adapter and the same head; nothing guards what was learnt before.

    `Sequential(model, gw.FineTuning(), classes=10)` is sequential fine-tuning of all weights. Run over
    `scenario.joined()` it is joint training.

    Args:
        classes: width of the head over all tasks.
        mask: leave the logits of other tasks' classes out of the training loss.
    """

    def __init__(
        self,
        model: nn.Module,
        technique: Technique,
        classes: int,
        *,
        pooling: Pooling = "first",
        mask: bool = True,
    ) -> None:
        super().__init__(model, technique, pooling=pooling)
        self.width, self.mask = classes, mask
        self.head: nn.Linear | None = None
        self._classes: Sequence[int] | None = None

    def begin(self, number: int, classes: Sequence[int], train: Samples) -> None:
        if self.head is None:
            self._make(self._queries(train.take(torch.arange(1))).shape[1])
        self._classes = tuple(classes) if self.mask else None

    def parameters(self) -> list[nn.Parameter]:
        return [*self._adapter().parameters(), *self._head().parameters()]

    def loss(self, batch: Samples, numbers: Tensor) -> Tensor:
        return masked_loss(self._head()(self._features(batch)), batch.labels, self._classes)

    def finish(self) -> None:
        return

    def predict(self, samples: Samples) -> Tensor:
        return self._head()(self._features(samples)).argmax(1)

    def state(self, number: int) -> dict[str, Tensor]:
        return {**prefixed(_PHI, whole_state(self._adapter())), **prefixed(HEAD, self._head().state_dict())}

    def restore(self, number: int, classes: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        own = part(tensors, HEAD)
        if self.head is None:
            self._make(own["weight"].shape[1])
        self._adapter().load_tensors(part(tensors, _PHI))
        self._head().load_state_dict(own)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "classes": self.width, "mask": self.mask}

    def _make(self, width: int) -> None:
        attach(self.model, self.technique, name=_NAME, head=False)
        self.head = head(width, self.width, self.model)

    def _adapter(self) -> Adapter:
        return adapters(self.model)[_NAME]

    def _head(self) -> nn.Linear:
        assert self.head is not None
        return self.head
