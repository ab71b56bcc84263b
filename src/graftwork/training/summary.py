"""Finished runs as a table: those that differ in nothing but seed and folder are one row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from graftwork.errors import StateError
from graftwork.training.folder import RunFolder
from graftwork.training.recipe import Recipe
from graftwork.training.result import RunResult, size

Run = tuple[Recipe, RunResult]
COLUMNS = ("technique", "learning rate", "seeds", "trained", "share", "file", "seconds")
HEAD = "FineTuning(workspaces=['head'])"  # attached to every model with a task head: it tells nothing apart


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Recipe and result of each folder; raises StateError where a folder holds no finished run."""
    return [_read(RunFolder(Path(folder))) for folder in folders]


def _read(folder: RunFolder) -> Run:
    if not folder.finished:
        raise StateError(f"{folder.path} holds no finished run: name folders that `graftwork tune` wrote")
    return Recipe.load(folder.recipe), RunResult.of(folder.facts(), str(folder.result))


def table(runs: Sequence[Run]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column names, and a row for each recipe in the order given.

    Scores are means over the seeds of the metric that decided, on each split, with the sample standard
    deviation where there are several; seconds are of a whole run.
    """
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(_apart_from_seed(run[0]), []).append(run)
    splits = list(dict.fromkeys(split for _, result in runs for split in result.scores))
    names = (*COLUMNS[:3], *splits, *COLUMNS[3:])
    return names, [_row(members, splits) for members in grouped.values()]


def _apart_from_seed(recipe: Recipe) -> str:
    training = recipe.training.model_copy(update={"seed": 0})
    return recipe.model_copy(update={"training": training, "output": ""}).text()


def _row(runs: Sequence[Run], splits: Sequence[str]) -> tuple[str, ...]:
    recipe, first = runs[0]
    results = [result for _, result in runs]
    scores = [[r.scores[split][r.best_metric] for r in results if split in r.scores] for split in splits]
    return (
        " + ".join([t for t in first.techniques if t != HEAD] or [HEAD]),
        f"{recipe.training.learning_rate:g}",
        str(len(runs)),
        *map(spread, scores),
        f"{first.trainable:,}",
        f"{first.share:.3%}",
        size(first.file_bytes),
        f"{fmean(r.seconds for r in results):.0f}",
    )


def spread(values: Sequence[float]) -> str:
    """`0.8731 ± 0.0042`: mean and sample standard deviation; the value alone where there is one."""
    if len(values) < 2:
        return "".join(f"{value:.4f}" for value in values)
    return f"{fmean(values):.4f} ± {stdev(values):.4f}"
