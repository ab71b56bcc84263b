"""A pool of members chosen by keys: Learning to Prompt, with any technique (L2P, Wang et al. 2022, arXiv:2112.08654).

All tasks share M members, their keys K (M, D) and one head W. With q = f0(x) and I the N members whose keys are
most like q:

    loss = CE(mask(W z), y) - pull * (1/B) Σ_b Σ_{m in I_b} cos(q_b, K_m)

Choosing is not differentiable, so keys are trained by the second term alone, members and head by the first alone.

    B samples, M members, N chosen, D width, C classes
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftwork.continual.features import Pooling
from graftwork.continual.keys import Mode, check_mode, pull, select
from graftwork.continual.method import HEAD, Method, head, masked_loss, part, prefixed, whole_state
from graftwork.continual.samples import Samples
from graftwork.engine.adapter import Adapter
from graftwork.engine.attach import attach
from graftwork.engine.verbs import adapters, route, trainable
from graftwork.errors import BadOption, nearest
from graftwork.reference.technique import Technique

KeyInit = Literal["symmetric", "positive"]
_KEYS = "keys"
_RANGES: dict[str, tuple[float, float]] = {"symmetric": (-1.0, 1.0), "positive": (0.0, 0.01)}


class Pool(Method):
    """What L2P and its variants share: queries, keys, choice, head and loss.

    Args:
        classes: C, width of the head over all tasks.
        members: M. chosen: N of them for each sample.
        pull: weight of the term that draws chosen keys to their queries.
        mode: "instance" chooses for each sample by itself; with "batch" (the published code's default) a sample's
            members, and so its prediction, depend on who else is in its batch, in training and at test.
        mask: leave the logits of other tasks' classes out of the training loss.
        own_members: task t trains members tN to (t+1)N - 1 alone; at test all can be chosen.
        key_init: "symmetric" draws keys from U(-1, 1) (PyTorch port), "positive" from U(0, 0.01) (published code).
    """

    def __init__(
        self,
        model: nn.Module,
        technique: Technique,
        classes: int,
        *,
        members: int = 10,
        chosen: int = 5,
        pull: float = 0.1,
        mode: Mode = "instance",
        mask: bool = True,
        own_members: bool = False,
        key_init: KeyInit = "symmetric",
        pooling: Pooling = "first",
    ) -> None:
        super().__init__(model, technique, pooling=pooling)
        check_mode(mode)
        _check(members, chosen, pull, key_init)
        self.width, self.members, self.chosen, self.pull = classes, members, chosen, pull
        self.mode, self.mask, self.own_members, self.key_init = mode, mask, own_members, key_init
        self.keys: nn.Parameter | None = None
        self.head: nn.Linear | None = None
        self._seen: Tensor | None = None
        self._classes: Sequence[int] | None = None
        self._among: range | None = None

    @abstractmethod
    def _attach(self) -> list[Adapter]:
        """Put the members on the model, as one adapter or several."""

    @abstractmethod
    def _chosen_features(self, samples: Samples, chosen: Tensor) -> Tensor:
        """Features (B, D) with the chosen members (B, N) at work."""

    def begin(self, number: int, classes: Sequence[int], train: Samples) -> None:
        self._seen = self._queries(train)
        if self.keys is None:
            self._make(self._seen.shape[1])
        self._classes = tuple(classes) if self.mask else None
        self._among = self._own(number) if self.own_members else None

    def parameters(self) -> list[nn.Parameter]:
        return [
            *(p for a in self._adapters() for p in a.parameters()),
            *self._head().parameters(),
            self._keys(),
        ]

    def loss(self, batch: Samples, numbers: Tensor) -> Tensor:
        assert self._seen is not None
        queries = self._seen[numbers]
        chosen = select(queries, self._keys(), self.chosen, self.mode, self._among)
        logits = self._head()(self._chosen_features(batch, chosen))
        drawn = pull(queries, self._keys(), chosen)
        return masked_loss(logits, batch.labels, self._classes) - self.pull * drawn

    def finish(self) -> None:
        self._seen = None

    def choice_of(self, samples: Samples) -> Tensor:
        """(B, N) the members chosen for each sample at test."""
        return select(self._queries(samples), self._keys(), self.chosen, self.mode)

    def predict(self, samples: Samples) -> Tensor:
        return self._head()(self._chosen_features(samples, self.choice_of(samples))).argmax(1)

    def state(self, number: int) -> dict[str, Tensor]:
        """The whole pool, its keys and head: tasks share them."""
        own = {f"{a.name}.{key}": t for a in self._adapters() for key, t in whole_state(a).items()}
        return {**own, **prefixed(HEAD, self._head().state_dict()), _KEYS: self._keys().detach()}

    def restore(self, number: int, classes: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        if self.keys is None:
            self._make(tensors[_KEYS].shape[1])
        for adapter in self._adapters():
            adapter.load_tensors(part(tensors, f"{adapter.name}."))
        self._head().load_state_dict(part(tensors, HEAD))
        self._keys().data.copy_(tensors[_KEYS])

    def settings(self) -> dict[str, Any]:
        named = ("members", "chosen", "pull", "mode", "mask", "own_members", "key_init")
        return {**super().settings(), "classes": self.width, **{name: getattr(self, name) for name in named}}

    def _make(self, width: int) -> None:
        trainable(self.model, *(adapter.name for adapter in self._attach()))
        self.head = head(width, self.width, self.model)
        self.keys = nn.Parameter(torch.empty_like(self.head.weight[:1]).repeat(self.members, 1))
        nn.init.uniform_(self.keys, *_RANGES[self.key_init])

    def _own(self, number: int) -> range:
        if (number + 1) * self.chosen > self.members:
            raise BadOption(
                f"own_members: task {number} would train members {number * self.chosen} to "
                f"{(number + 1) * self.chosen - 1} of {self.members}; give the pool more members"
            )
        return range(number * self.chosen, (number + 1) * self.chosen)

    def _adapters(self) -> list[Adapter]:
        return list(adapters(self.model).values())

    def _head(self) -> nn.Linear:
        assert self.head is not None
        return self.head

    def _keys(self) -> nn.Parameter:
        assert self.keys is not None
        return self.keys


class AdapterPool(Pool):
    """L2<technique>: `AdapterPool(model, gw.LoRA(rank=4), classes=10)` is L2L, "learning to LoRA".

    Each member is an adapter; the chosen ones' effects are added at each site (a route by weights 0 and 1), so N
    LoRAs of rank r act as one of rank N r. For techniques at the weight and the hidden port. The head reads the
    features at the usual positions. (Wistuba et al. 2024, arXiv:2406.03216; whether they add or average is not
    known to us; an average only rescales alpha.)
    """

    def _attach(self) -> list[Adapter]:
        return [
            attach(self.model, self.technique, name=name, head=False, verify=False) for name in self._names()
        ]

    def _chosen_features(self, samples: Samples, chosen: Tensor) -> Tensor:
        weights = torch.zeros(len(chosen), self.members, device=chosen.device).scatter(1, chosen, 1.0)
        with route(self.model, self._names(), weights=weights):
            return self._features(samples)

    def _names(self) -> list[str]:
        return [f"member-{number}" for number in range(self.members)]


def _check(members: int, chosen: int, pull: float, key_init: str) -> None:
    if not 1 <= chosen <= members:
        raise BadOption(
            f"chosen={chosen} of members={members}: choose at least one and no more than there are"
        )
    if pull < 0:
        raise BadOption(f"pull={pull} would drive keys away from their queries; it is at least 0")
    if key_init not in _RANGES:
        raise BadOption(f"no key_init is called {key_init!r}. {nearest(key_init, _RANGES)}")
