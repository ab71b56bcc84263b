"""A run over the tasks of a scenario, which a kill at any moment leaves able to go on.

A run's folder holds one file per finished task, `task-00.safetensors`: what the task left behind, and in its
header the accuracies measured then. A file appears whole or not at all; a task without one is learnt anew, and
comes out the same, since it depends on the seed and the files before it alone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from graftwork.adapters.disk import write_atomically
from graftwork.adapters.installing import base_of
from graftwork.continual import metrics
from graftwork.continual.features import device_of
from graftwork.continual.learning import Learning
from graftwork.continual.method import Method
from graftwork.continual.samples import Samples
from graftwork.continual.scenario import Scenario
from graftwork.engine.verbs import adapters
from graftwork.errors import BadFile, StateError

_EVALUATED = 64  # samples at a time


@dataclass(frozen=True)
class Result:
    """What a run measured.

    Attributes:
        accuracies: R[t][i], accuracy on the test set of task i after learning task t, for i <= t.
        held_out: accuracy on the scenario's fixed test set after each task, empty without one.
    """

    accuracies: tuple[tuple[float, ...], ...]
    held_out: tuple[float, ...] = ()

    @property
    def average_accuracy(self) -> float:
        """Mean over all tasks after the last; with a fixed test set use `held_out[-1]`."""
        return metrics.average_accuracy(self.accuracies)

    @property
    def forgetting(self) -> float:
        """Mean drop from the best accuracy before the last task."""
        return metrics.forgetting(self.accuracies)

    @property
    def backward_transfer(self) -> float:
        """Mean change from right after a task's training to the end."""
        return metrics.backward_transfer(self.accuracies)


def run(
    scenario: Scenario, method: Method, learning: Learning | None = None, folder: str | Path | None = None
) -> Result:
    """Learn the tasks of a scenario one after another, measuring after each on the test sets so far.

    Args:
        method: a learner that has not learnt yet, over a model with nothing attached.
        folder: where finished tasks are kept; a run that was cut off goes on from there.

    Raises:
        StateError: something is attached to the model already, or the folder holds another run.
        BadFile: a file of the folder is damaged.
    """
    learning = learning or Learning()
    if adapters(method.model):
        raise StateError(
            f"a run starts from a bare model, but {', '.join(adapters(method.model))} is attached; detach it, "
            "and make a new learner (a run that was cut off is continued through its folder)"
        )
    kept = None if folder is None else _Folder(Path(folder), _fingerprint(scenario, method, learning))
    rows = [] if kept is None else kept.restore(scenario, method)
    for number in range(len(rows), len(scenario.tasks)):
        task = scenario.tasks[number]
        learning.learn(method, number, task.classes, task.train)
        rows.append(_measure(scenario, method, number))
        if kept is not None:
            kept.write(number, method.state(number), rows[-1])
    held = tuple(row["held_out"] for row in rows if row["held_out"] is not None)
    return Result(tuple(tuple(row["accuracies"]) for row in rows), held)


def accuracy(method: Method, samples: Samples) -> float:
    """Share of samples whose class a learner predicts, without knowing their task."""
    method.model.eval()
    with torch.no_grad():
        batches = (part.to(device_of(method.model)) for part in samples.batches(_EVALUATED))
        right = sum(int((method.predict(part) == part.labels).sum()) for part in batches)
    return right / len(samples)


def _measure(scenario: Scenario, method: Method, number: int) -> dict[str, Any]:
    held = scenario.held_out
    return {
        "accuracies": [accuracy(method, task.test) for task in scenario.tasks[: number + 1]],
        "held_out": None if held is None else accuracy(method, held),
    }


def _fingerprint(scenario: Scenario, method: Method, learning: Learning) -> str:
    base = base_of(
        method.model
    ).fingerprint  # without a pooler, which a bare model may draw anew when it is loaded
    parts = [scenario.fingerprint(), base, method.settings(), asdict(learning)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class _Folder:
    """The files of one run."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint

    def write(self, number: int, tensors: dict[str, Tensor], row: dict[str, Any]) -> None:
        header = {"run": self.fingerprint, "measured": json.dumps(row)}
        content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, header)

        def write(out: BinaryIO) -> None:
            out.write(content)

        write_atomically(self._file(number), write)

    def restore(self, scenario: Scenario, method: Method) -> list[dict[str, Any]]:
        """Give a fresh learner the state of the tasks that are finished; what was measured after each."""
        rows: list[dict[str, Any]] = []
        for number, task in enumerate(scenario.tasks):
            if not self._file(number).is_file():
                break
            tensors, row = self._read(number)
            method.restore(number, task.classes, tensors)
            rows.append(row)
        return rows

    def _read(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        file = self._file(number)
        try:
            with safe_open(file, framework="pt") as stored:
                header = stored.metadata()
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise BadFile(f"{file} is damaged ({error}); remove it, and its task is learnt anew") from None
        if not header or header.get("run") != self.fingerprint:
            raise StateError(
                f"{file} belongs to a run with other data, another base, method or options; "
                "give this run a folder of its own"
            )
        return tensors, json.loads(header["measured"])

    def _file(self, number: int) -> Path:
        return self.path / f"task-{number:02d}.safetensors"
