"""How each task is learnt: epochs, batches, optimiser. The same for every method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from graftwork.continual.features import device_of
from graftwork.continual.method import Method
from graftwork.continual.samples import Samples
from graftwork.reference.technique import Above, AtLeast, check_options


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Options of training on one task; the optimiser is new for each task, without weight decay.

    Args:
        epochs, batch_size, learning_rate: as ever.
        optimizer: "adam" (L2P), or "sgd" with a momentum of 0.9 (S-Prompts).
        schedule: "constant" (L2P) or "cosine" to zero (S-Prompts).
        clip: largest norm of all gradients together, None for no limit.
        seed: decides, with the task's number, the order of samples and where what is new starts.
    """

    name = "learning"

    epochs: Annotated[int, AtLeast(1)] = 5
    batch_size: Annotated[int, AtLeast(1)] = 16
    learning_rate: Annotated[float, Above(0)] = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    schedule: Literal["constant", "cosine"] = "constant"
    clip: Annotated[float | None, Above(0)] = 1.0
    seed: Annotated[int, AtLeast(0)] = 0

    def __post_init__(self) -> None:
        check_options(self)  # type: ignore[arg-type]

    def learn(self, method: Method, number: int, classes: tuple[int, ...], train: Samples) -> None:
        """Train a method on task `number`: all it is given are that task's data and classes.

        The result depends on the method's state, the data and the seed, not on torch's generator, which is left
        as it was.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + number)
            method.begin(number, classes, train)
            method.model.train()
            self._train(method, train)
            method.model.eval()
            method.finish()

    def _train(self, method: Method, train: Samples) -> None:
        parameters = method.parameters()
        optimizer = self._optimizer(parameters)
        scheduler = self._scheduler(optimizer, len(train))
        for numbers in self._order(len(train)):
            method.loss(train.take(numbers).to(device_of(method.model)), numbers).backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(parameters, self.clip)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    def _order(self, samples: int) -> Iterator[Tensor]:
        for _ in range(self.epochs):
            yield from torch.randperm(samples).split(self.batch_size)

    def _optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        if self.optimizer == "sgd":
            return SGD(parameters, lr=self.learning_rate, momentum=0.9)
        return Adam(parameters, lr=self.learning_rate)

    def _scheduler(self, optimizer: Optimizer, samples: int) -> LRScheduler:
        if self.schedule == "cosine":
            return CosineAnnealingLR(optimizer, self.epochs * -(-samples // self.batch_size))
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
