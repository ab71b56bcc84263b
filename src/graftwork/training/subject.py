"""A trained adapter with what belongs to it: base, task, recipe. From a run folder, or from a bare file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from graftwork.adapters.format import read_card
from graftwork.adapters.store import load, locate
from graftwork.engine.verbs import route
from graftwork.errors import BadOption, StateError
from graftwork.tasks.base import Task
from graftwork.tasks.registry import make_task
from graftwork.training.folder import RunFolder
from graftwork.training.joined import load_connector
from graftwork.training.materials import base
from graftwork.training.recipe import Model, Recipe
from graftwork.training.result import RunResult
from graftwork.training.tokens import router


@dataclass(frozen=True)
class Subject:
    """An adapter file (of contexts their folder), the base it belongs to, its task, and what else its run has."""

    adapter: Path
    model: Model
    task: Task
    recipe: Recipe | None = None
    connector: Path | None = None

    def load(self) -> tuple[nn.Module, Any]:
        """The base with the adapter on it, or with all contexts and their route, and the preprocessor."""
        host, preprocessor = base(self.model, self.task)
        if self.connector is not None:
            load_connector(host, self.connector)
        contexts = None if self.recipe is None else self.recipe.contexts
        if contexts is None:
            load(host, self.adapter)
            return host, preprocessor
        for name in contexts:
            load(host, self.adapter, name=name)
        route(host, list(contexts), by=router(contexts, host, preprocessor))
        return host, preprocessor


def open_subject(source: str | Path, *, model: str | None = None, task: str | None = None) -> Subject:
    """What `source` is: a run folder knows its base and task, an adapter file needs both named."""
    path = Path(source)
    return _of_run(path, model) if RunFolder(path).recipe.exists() else _of_file(path, model, task)


def _of_run(path: Path, model: str | None) -> Subject:
    folder = RunFolder(path)
    if not folder.finished:
        raise StateError(
            f"the run in {path} is not finished: `graftwork tune {folder.recipe}` goes on with it"
        )
    recipe = Recipe.load(folder.recipe)
    labels = RunResult.of(folder.facts(), str(folder.result)).labels
    other = None if model is None else {"name": model, "vision": None, "text": None}
    host = recipe.model if other is None else recipe.model.model_copy(update=other)
    connector = folder.connector if recipe.model.pair else None
    return Subject(
        folder.adapter, host, _task(recipe.task.name, recipe.task.options, labels), recipe, connector
    )


def _of_file(path: Path, model: str | None, task: str | None) -> Subject:
    if model is None or task is None:
        raise BadOption(f"{path} is no run folder; an adapter file needs --model and --task beside it")
    file = locate(path)
    labels = () if file.is_dir() else tuple((read_card(file).labels or {}).values())
    return Subject(file, Model(name=model), _task(task, {}, labels))


def _task(name: str, options: dict[str, Any], labels: tuple[str, ...]) -> Task:
    return make_task(name, {**options, **({"labels": list(labels)} if labels else {})})
