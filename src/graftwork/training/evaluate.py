"""`evaluate(run_or_adapter)`: score an adapter again, on its own data or on other."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments

from graftwork.adapters.files import load, read_card
from graftwork.data.readers import read_rows, splits_of
from graftwork.data.rows import Rows
from graftwork.errors import BadData, BadOption
from graftwork.tasks.base import Task
from graftwork.tasks.registry import make_task
from graftwork.training.folder import RunFolder
from graftwork.training.materials import Materials, base, read
from graftwork.training.recipe import Model, Recipe
from graftwork.training.result import RunResult
from graftwork.training.run import make_trainer, scores_on


@dataclass(frozen=True)
class _Subject:
    """What is scored: an adapter file, its base and task, and the rows it comes with."""

    adapter: Path
    model: Model
    task: Task
    recipe: Recipe | None


def evaluate(
    source: str | Path,
    data: str | None = None,
    *,
    model: str | None = None,
    task: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str | int] | None = None,
    limit: int | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """Loss and the task's metrics of an adapter.

    Args:
        source: a run folder, or an adapter file (or its folder).
        data: what to score on; a run's own data when None.
        model, task: base model and task; a run knows both, an adapter file neither.
        split: the part of `data`; test, or validation where there is no test part.
        columns: role -> column of `data`; a run's own when None.
        limit: at most so many rows.
        batch_size: rows at a time.
    """
    subject = _of_run(Path(source), model) or _of_adapter(Path(source), model, task)
    rows = _rows(subject, data, split, columns)
    host, preprocessor = base(subject.model, subject.task)
    load(host, subject.adapter)
    examples = subject.task.encode(rows if limit is None else rows.head(limit), preprocessor)
    materials = Materials(subject.task, host, preprocessor, {})
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=batch_size,
            remove_unused_columns=False,
            label_names=["labels"],
            report_to="none",
            disable_tqdm=True,
        )
        trainer = make_trainer(materials, args=arguments, patience=None, groups=lambda _: ())
        return scores_on(trainer, examples)


def _of_run(path: Path, model: str | None) -> _Subject | None:
    folder = RunFolder(path)
    if not folder.recipe.exists():
        return None
    if not folder.finished:
        raise BadOption(
            f"the run in {path} is not finished: `graftwork tune {folder.recipe}` goes on with it"
        )
    recipe = Recipe.load(folder.recipe)
    labels = RunResult.of(folder.facts(), str(folder.result)).labels
    task = make_task(recipe.task.name, {**recipe.task.options, **({"labels": labels} if labels else {})})
    host = recipe.model if model is None else recipe.model.model_copy(update={"name": model})
    return _Subject(folder.adapter, host, task, recipe)


def _of_adapter(path: Path, model: str | None, task: str | None) -> _Subject:
    if model is None or task is None:
        raise BadOption(f"{path} is no run folder; an adapter file needs --model and --task beside it")
    labels = tuple((read_card(path).labels or {}).values())
    return _Subject(path, Model(name=model), make_task(task, {"labels": labels} if labels else {}), None)


def _rows(
    subject: _Subject, data: str | None, split: str | None, columns: Mapping[str, str | int] | None
) -> Rows:
    recipe = subject.recipe
    if data is not None:
        parts = splits_of(data)
        part = split or ("test" if "test" in parts else "validation" if "validation" in parts else None)
        own = columns if columns is not None or recipe is None else recipe.data.columns
        return read_rows(data, split=part, columns=own)
    if recipe is None:
        raise BadOption("an adapter file brings no data: name some with --data")
    found = read(recipe.data, recipe.training.seed)
    chosen = getattr(found, split) if split else found.test or found.validation
    if chosen is None:
        raise BadData(f"the run's data has no {split} part")
    return chosen
