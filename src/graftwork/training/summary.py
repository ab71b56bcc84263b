"""Finished runs as a table: those that differ in nothing but seed and folder are one row.

Of runs that share the seed too, the newest counts: a repetition is no further sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from graftwork.errors import StateError
from graftwork.training.folder import RunFolder
from graftwork.training.recipe import Recipe
from graftwork.training.result import RunResult, size

COLUMNS = ("technique", "learning rate", "seeds", "trained", "share", "file", "seconds")
HEAD = "FineTuning(workspaces=['head'])"  # attached to every model with a task head: it tells nothing apart


@dataclass(frozen=True)
class Run:
    """A finished run; `finished` is when, in seconds since the epoch."""

    recipe: Recipe
    result: RunResult
    finished: float


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """The run in each folder; raises StateError where a folder holds no finished run."""
    distinct = {Path(folder).resolve(): Path(folder) for folder in folders}
    return [_read(RunFolder(folder)) for folder in distinct.values()]


def _read(folder: RunFolder) -> Run:
    if not folder.finished:
        raise StateError(f"{folder.path} holds no finished run: name folders that `graftwork tune` wrote")
    result = RunResult.of(folder.facts(), str(folder.result))
    return Run(Recipe.load(folder.recipe), result, folder.result.stat().st_mtime)


def table(runs: Sequence[Run]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column names, and a row for each recipe in the order given.

    Scores are means over the seeds of the metric that decided, on each split, with the sample standard
    deviation where there are several; seconds are of a whole run. Where runs share a seed, the newest counts.
    """
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(_apart_from_seed(run.recipe), []).append(run)
    splits = list(dict.fromkeys(split for run in runs for split in run.result.scores))
    names = (*COLUMNS[:3], *splits, *COLUMNS[3:])
    return names, [_row(members, splits) for members in grouped.values()]


def _apart_from_seed(recipe: Recipe) -> str:
    training = recipe.training.model_copy(update={"seed": 0})
    return recipe.model_copy(update={"training": training, "output": ""}).text()


def _row(runs: Sequence[Run], splits: Sequence[str]) -> tuple[str, ...]:
    newest = {run.recipe.training.seed: run for run in sorted(runs, key=lambda run: run.finished)}
    recipe, first = runs[0].recipe, runs[0].result
    results = [run.result for run in newest.values()]
    scores = [[r.scores[split][r.best_metric] for r in results if split in r.scores] for split in splits]
    return (
        " + ".join([t for t in first.techniques if t != HEAD] or [HEAD]),
        f"{recipe.training.learning_rate:g}",
        _seeds(len(newest), len(runs) - len(newest)),
        *map(spread, scores),
        f"{first.trainable:,}",
        f"{first.share:.3%}",
        size(first.file_bytes),
        f"{fmean(r.seconds for r in results):.0f}",
    )


def _seeds(count: int, repeated: int) -> str:
    return f"{count} ({repeated} older left out)" if repeated else str(count)


def spread(values: Sequence[float]) -> str:
    """`0.8731 ± 0.0042`: mean and sample standard deviation; the value alone where there is one."""
    if len(values) < 2:
        return "".join(f"{value:.4f}" for value in values)
    return f"{fmean(values):.4f} ± {stdev(values):.4f}"
