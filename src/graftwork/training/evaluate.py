"""`evaluate(run_or_adapter)`: score an adapter again, on its own data or on other."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import TrainingArguments

from graftwork.data.readers import read_rows, splits_of
from graftwork.data.rows import Rows
from graftwork.errors import BadData, BadOption
from graftwork.training.materials import Materials, read
from graftwork.training.recipe import Recipe
from graftwork.training.run import make_trainer, scores_on
from graftwork.training.subject import open_subject

Columns = Mapping[str, str | int]


def evaluate(
    source: str | Path,
    data: str | None = None,
    *,
    model: str | None = None,
    task: str | None = None,
    split: str | None = None,
    columns: Columns | None = None,
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
    subject = open_subject(source, model=model, task=task)
    rows = _own(subject.recipe, split) if data is None else _other(subject.recipe, data, split, columns)
    host, preprocessor = subject.load()
    examples = subject.task.encode(rows if limit is None else rows.head(limit), preprocessor)
    materials = Materials(subject.task, host, preprocessor, {})
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            materials, args=_arguments(folder, batch_size), patience=None, groups=lambda _: ()
        )
        return scores_on(trainer, examples)


def _arguments(folder: str, batch_size: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_eval_batch_size=batch_size,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=True,
    )


def _own(recipe: Recipe | None, split: str | None) -> Rows:
    if recipe is None:
        raise BadOption("an adapter file brings no data: name some with --data")
    found = read(recipe.data, recipe.training.seed)
    parts = {"train": found.train, "validation": found.validation, "test": found.test}
    there = {name: rows for name, rows in parts.items() if rows is not None}
    chosen = split or next(name for name in ("test", "validation", "train") if name in there)
    if chosen not in there:
        raise BadData(f"the run's data has no part {chosen!r}; it has {', '.join(there)}")
    return there[chosen]


def _other(recipe: Recipe | None, data: str, split: str | None, columns: Columns | None) -> Rows:
    parts = splits_of(data)
    part = split or next((name for name in ("test", "validation", "train") if name in parts), None)
    own = columns if columns is not None or recipe is None else recipe.data.columns
    return read_rows(data, split=part, columns=own)
