"""One run of a study: its settings, the cells measured so far, and the way to measure another."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwork.bench.machine import facts
from graftwork.studies.cells import Cell, Cells, Measured, Plain, key, versions

if TYPE_CHECKING:
    from graftwork.studies.study import Settings

Watch = Callable[[str, Cell | None], None]


class Session:
    """What a study's `run` is given.

    Args:
        settings: seeds, size, data.
        cells: where measurements are kept.
        watch: called with (what, None) when a cell begins to be measured and (what, cell) when it is there.

    Attributes:
        used: the cells that this run asked for, in order; the page shows these and no others.
    """

    def __init__(self, settings: Settings, cells: Cells, watch: Watch | None = None) -> None:
        self.settings, self.used = settings, dict[str, Cell]()
        self._cells, self._watch = cells, watch or (lambda what, cell: None)
        self._versions, self._machine = versions(), _machine()

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.settings.seeds

    def pick(self, *, small: Any, full: Any) -> Any:
        """The one of two values that belongs to the size."""
        return small if self.settings.size == "small" else full

    def data(self, name: str) -> Path | None:
        """The folder of a data set, None where it is not present."""
        folder = self.settings.data and self.settings.data / name
        return folder if folder and folder.is_dir() else None

    def cell(self, arm: str, task: str, seed: int, measure: Callable[[], Measured], **given: Plain) -> Cell:
        """The figures of one arm on one task with one seed, measured unless they are stored.

        Args:
            arm: what is compared, a technique for instance.
            measure: called without arguments, with torch's generator seeded.
            given: all further choices that decide the figures; a cell stored under others does not count.
        """
        found = self._cells.find(key(arm, task, seed, given, self._versions))
        if found is None:
            found = self._measured(arm, task, seed, measure, given)
        self.used[found.key] = found
        return found

    def _measured(
        self, arm: str, task: str, seed: int, measure: Callable[[], Measured], given: dict[str, Plain]
    ) -> Cell:
        what = ", ".join([arm, task, f"seed {seed}", *(f"{name} {value}" for name, value in given.items())])
        self._watch(what, None)
        torch.manual_seed(seed)
        start = time.process_time()
        measured = measure()
        cell = Cell(
            arm=arm,
            task=task,
            seed=seed,
            given=given,
            figures={name: float(value) for name, value in measured.figures.items()},
            curves={name: tuple(points) for name, points in measured.curves.items()},
            seconds=round(time.process_time() - start, 1),
            machine=self._machine,
            versions=self._versions,
        )
        self._cells.add(cell)
        self._watch(what, cell)
        return cell


def _machine() -> str:
    found = facts("cuda" if torch.cuda.is_available() else "cpu")
    threads = found["threads"]
    parts = [str(found["processor"]), f"{threads} thread{'' if threads == 1 else 's'}"]
    return ", ".join([*parts, str(found["accelerator"])] if "accelerator" in found else parts)
