"""The figures of a study as they are measured: one JSON line for each arm, task and seed.

A line is written as soon as its cell is measured, so an interrupted study goes on where it was. A stored cell counts
only for the same arm, task, seed, choices and library versions; a later line replaces an earlier one.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from graftwork.errors import BadData, BadOption

Plain = str | int | float | bool | None
Line = Sequence[tuple[float, float]]
_LIBRARIES = ("torch", "transformers")


def versions() -> dict[str, str]:
    """Of the libraries that figures depend on."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


@dataclass(frozen=True)
class Measured:
    """What was measured for one arm, task and seed.

    Attributes:
        figures: by name; one that is not finite (a run that diverged) is kept as NaN.
        curves: by name, points (x, y) in the order of x.
    """

    figures: Mapping[str, float]
    curves: Mapping[str, Line] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A stored measurement.

    Attributes:
        arm, task, seed: what was measured, on what, in which repetition.
        given: choices beyond these that decide the figures (a rate, a number of steps).
        figures, curves: see Measured.
        seconds: of processor time that measuring took, which other work on the machine does not change.
        machine: where: processor, threads.
        versions: of the libraries.
    """

    arm: str
    task: str
    seed: int
    given: Mapping[str, Plain]
    figures: Mapping[str, float]
    curves: Mapping[str, Line]
    seconds: float
    machine: str
    versions: Mapping[str, str]

    @property
    def key(self) -> str:
        """What a stored cell must agree in to count."""
        return key(self.arm, self.task, self.seed, self.given, self.versions)

    def line(self) -> str:
        """As JSON; numbers that are not finite are null."""
        plain = {
            **self.__dict__,
            "figures": {name: _or_none(value) for name, value in self.figures.items()},
            "curves": {
                name: [[_or_none(x), _or_none(y)] for x, y in points] for name, points in self.curves.items()
            },
        }
        return json.dumps(plain, ensure_ascii=False, allow_nan=False)

    @classmethod
    def of(cls, line: str) -> Cell:
        """Back from JSON; raises ValueError, TypeError or KeyError where it is none."""
        plain = json.loads(line)
        plain["figures"] = {name: _or_nan(value) for name, value in plain["figures"].items()}
        plain["curves"] = {
            name: tuple((_or_nan(x), _or_nan(y)) for x, y in points)
            for name, points in plain["curves"].items()
        }
        return cls(**plain)


def key(arm: str, task: str, seed: int, given: Mapping[str, Plain], libraries: Mapping[str, str]) -> str:
    """Canonical text of what identifies a cell; BadOption for a choice that JSON cannot hold."""
    try:
        return json.dumps([arm, task, seed, dict(given), dict(libraries)], sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadOption(f"choices of {arm} on {task} must be plain values: {error}") from None


class Cells:
    """The cells of one file.

    Raises BadData for a line that is no cell; a last line without its end (the process was killed while writing) is
    dropped and measured again.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._cells = {cell.key: cell for cell in _read(file)}

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._cells.values())

    def find(self, key: str) -> Cell | None:
        return self._cells.get(key)

    def add(self, cell: Cell) -> None:
        """Store it, on the disk before this returns."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as out:
            out.write(cell.line() + "\n")
            out.flush()
            os.fsync(out.fileno())
        self._cells[cell.key] = cell

    def clear(self) -> None:
        """Forget all, on the disk too."""
        self.file.unlink(missing_ok=True)
        self._cells.clear()


def _read(file: Path) -> Iterator[Cell]:
    if not file.exists():
        return
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            yield Cell.of(line)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadData(
                f"{file}, line {number} is no cell of a study ({error}); delete the line, or use --fresh"
            ) from None


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
