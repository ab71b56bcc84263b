"""One adapter and one head per task, found by k-means centres: S-Prompts with any technique.

Wang, Huang, Hong 2022 (arXiv:2207.12819) with prompts; with LoRA it is S-LoRA (Wistuba et al. 2024,
arXiv:2406.03216). For each task t: phi_t and W_t are trained on D_t alone and then frozen, A_t are k-means
centres of the base's features of D_t. A sample goes to the task of its nearest centre:

    t* = argmin_t min_j dist(f0(x) / |f0(x)|, A_t[j])        y = argmax W_t* f(x; phi_t*)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.continual.centres import Distance, centres_of, check_distance, nearest_task
from graftwork.continual.features import Pooling
from graftwork.continual.method import HEAD, Method, frozen, head, part, prefixed, whole_state, within
from graftwork.continual.samples import Samples
from graftwork.engine.attach import attach
from graftwork.engine.verbs import active, adapters, route, trainable
from graftwork.errors import BadOption
from graftwork.reference.technique import Technique

_PHI, _CENTRES = "adapter.", "centres"


class TaskAdapters(Method):
    """S-<technique>: `TaskAdapters(model, gw.PromptTuning(length=10))` is S-Prompts, `gw.LoRA(rank=4)` S-LoRA.

    Args:
        centres: k of k-means for each task.
        distance: "l2" (paper) or "l1" (published code).
    """

    def __init__(
        self,
        model: nn.Module,
        technique: Technique,
        *,
        pooling: Pooling = "first",
        centres: int = 5,
        distance: Distance = "l2",
    ) -> None:
        super().__init__(model, technique, pooling=pooling)
        check_distance(distance)
        if centres < 1:
            raise BadOption(f"centres={centres} must be at least 1")
        self.count, self.distance = centres, distance
        self.heads: list[nn.Linear] = []
        self.classes: list[Tensor] = []
        self.centres: list[Tensor] = []
        self._seen: Tensor | None = None

    def begin(self, number: int, classes: Sequence[int], train: Samples) -> None:
        self._seen = self._queries(train)
        self._add(number, classes, self._seen.shape[1])

    def parameters(self) -> list[nn.Parameter]:
        return [*adapters(self.model)[_name(len(self.heads) - 1)].parameters(), *self.heads[-1].parameters()]

    def loss(self, batch: Samples, numbers: Tensor) -> Tensor:
        with active(self.model, _name(len(self.heads) - 1)):
            logits = self.heads[-1](self._features(batch))
        return functional.cross_entropy(logits, within(self.classes[-1].tolist(), batch.labels))

    def finish(self) -> None:
        assert self._seen is not None
        self.centres.append(centres_of(self._seen, self.count))
        self._seen = None
        self._freeze()

    def task_of(self, samples: Samples) -> Tensor:
        """(B,) the task that each sample is given to."""
        return nearest_task(self._queries(samples), self.centres, self.distance)

    def predict(self, samples: Samples, tasks: Tensor | None = None) -> Tensor:
        """Predicted classes (B,); `tasks` (B,) in place of the tasks found by centres (an oracle)."""
        tasks = self.task_of(samples) if tasks is None else tasks
        with route(self.model, [_name(n) for n in range(len(self.heads))], tasks):
            found = self._features(samples)
        out = torch.empty_like(tasks)
        for number in tasks.unique().tolist():
            rows = tasks == number
            out[rows] = self.classes[number][self.heads[number](found[rows]).argmax(1)]
        return out

    def state(self, number: int) -> dict[str, Tensor]:
        """(phi_t, W_t, A_t) and nothing else."""
        phi = whole_state(adapters(self.model)[_name(number)])
        own = self.heads[number].state_dict()
        return {**prefixed(_PHI, phi), **prefixed(HEAD, own), _CENTRES: self.centres[number]}

    def restore(self, number: int, classes: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        own = part(tensors, HEAD)
        self._add(number, classes, own["weight"].shape[1])
        adapters(self.model)[_name(number)].load_tensors(part(tensors, _PHI))
        self.heads[-1].load_state_dict(own)
        self.centres.append(tensors[_CENTRES].to(own["weight"]))
        self._freeze()

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "centres": self.count, "distance": self.distance}

    def _add(self, number: int, classes: Sequence[int], width: int) -> None:
        attach(self.model, self.technique, name=_name(number), head=False)
        own = head(width, len(classes), self.model)
        self.heads.append(own)
        self.classes.append(torch.tensor(classes, device=own.weight.device))

    def _freeze(self) -> None:
        trainable(self.model)
        frozen(self.heads[-1].parameters())


def _name(number: int) -> str:
    return f"task-{number}"
