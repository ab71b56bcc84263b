"""All tasks by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from graftwork.errors import UnknownName, nearest
from graftwork.tasks.base import Task


def tasks() -> Mapping[str, type[Task]]:
    """Name -> class of every task, sorted by name; a file in this folder is found by itself."""
    package = importlib.import_module("graftwork.tasks")
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"graftwork.tasks.{found.name}")
    return dict(sorted((kind.name, kind) for kind in Task.__subclasses__()))


def task_class(name: str) -> type[Task]:
    """The class of a task by its kebab name."""
    known = tasks()
    if name not in known:
        raise UnknownName(f"no task is called {name!r}. {nearest(name, known)}")
    return known[name]


def make_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """A task from its name and plain option values, as a recipe or an adapter file spells it."""
    kind = task_class(name)
    known = {f.name for f in fields(kind)}
    for key in options or {}:
        if key not in known:
            raise UnknownName(f"{name} has no option {key!r}. {nearest(key, known)}")
    return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in (options or {}).items()})
