"""A scenario: tasks that come one after another, by new classes or by new domains of the same classes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from graftwork.continual.samples import Samples
from graftwork.errors import BadData, BadOption

Kind = Literal["class-incremental", "domain-incremental"]


@dataclass(frozen=True)
class Stage:
    """One task: what it is trained on, what it is tested on, and its label space."""

    name: str
    train: Samples
    test: Samples
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Scenario:
    """Tasks in the order in which they come.

    Args:
        kind: "class-incremental" (disjoint classes) or "domain-incremental" (the same classes in new domains).
        tasks: at least one.
        held_out: a fixed test set of its own, on which the model is measured after each task as well
            (CORe50's protocol).
    """

    kind: Kind
    tasks: tuple[Stage, ...]
    held_out: Samples | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise BadData("a scenario needs at least one task")
        for task in self.tasks:
            _check(task)
        spaces = [set(task.classes) for task in self.tasks]
        if self.kind == "domain-incremental" and any(space != spaces[0] for space in spaces):
            raise BadData(f"domains of one scenario have the same classes, not {_sets(self.tasks)}")
        if self.kind == "class-incremental" and sum(map(len, spaces)) != len(set().union(*spaces)):
            raise BadData(
                f"tasks of a class-incremental scenario share no class, but these do: {_sets(self.tasks)}"
            )

    @property
    def classes(self) -> int:
        """Width of a head over all classes."""
        return 1 + max(label for task in self.tasks for label in task.classes)

    def joined(self) -> Scenario:
        """The same data as a single task: training on it is the upper bound."""
        train = Samples.joined([task.train for task in self.tasks])
        test = Samples.joined([task.test for task in self.tasks])
        classes = tuple(sorted({label for task in self.tasks for label in task.classes}))
        return Scenario(self.kind, (Stage("joined", train, test, classes),), self.held_out)

    def fingerprint(self) -> str:
        """Sixteen hex digits over all data, for telling an interrupted run's scenario from another."""
        digest = hashlib.sha256(self.kind.encode())
        held = [] if self.held_out is None else [self.held_out]
        for samples in [part for task in self.tasks for part in (task.train, task.test)] + held:
            for name, values in sorted({**samples.inputs, "": samples.labels}.items()):
                digest.update(f"{name}{tuple(values.shape)}{values.dtype}".encode())
                digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def by_classes(
    train: Samples, test: Samples, groups: int | Sequence[Sequence[int]], *, held_out: Samples | None = None
) -> Scenario:
    """Class-incremental: one task for each group of classes.

    Args:
        groups: the classes of each task, or a number of tasks that divides the classes in ascending order.
    """
    parts = _even(train.classes, groups) if isinstance(groups, int) else [tuple(g) for g in groups]
    tasks = tuple(
        Stage("classes " + ", ".join(map(str, group)), train.of_classes(group), test.of_classes(group), group)
        for group in parts
    )
    return Scenario("class-incremental", tasks, held_out)


def by_domains(
    domains: Mapping[str, tuple[Samples, Samples]], *, held_out: Samples | None = None
) -> Scenario:
    """Domain-incremental: one task for each domain, name -> (train, test), in the order given."""
    tasks = tuple(Stage(name, train, test, train.classes) for name, (train, test) in domains.items())
    return Scenario("domain-incremental", tasks, held_out)


def _even(classes: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
    if count < 1 or len(classes) % count:
        raise BadOption(
            f"{len(classes)} classes cannot be divided evenly among {count} tasks; give the groups"
        )
    size = len(classes) // count
    return [classes[n : n + size] for n in range(0, len(classes), size)]


def _check(task: Stage) -> None:
    for part, samples in (("train", task.train), ("test", task.test)):
        if not len(samples):
            raise BadData(f"task {task.name!r} has no {part} samples")
        if strange := set(samples.classes) - set(task.classes):
            raise BadData(
                f"task {task.name!r} has {part} samples of classes {sorted(strange)}, not among its own"
            )


def _sets(tasks: tuple[Stage, ...]) -> str:
    return ", ".join(f"{task.name}: {list(task.classes)}" for task in tasks)
