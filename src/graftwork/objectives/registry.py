"""All objectives by name; one of your own counts once its module is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from graftwork.errors import BadOption, UnknownName, nearest
from graftwork.objectives.base import Objective


def objectives() -> Mapping[str, type[Objective]]:
    """Name -> class of every objective, sorted by name."""
    return dict(sorted((kind.name, kind) for kind in Objective.__subclasses__()))


def make_objective(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    """An objective from its name and plain option values, as a recipe spells it."""
    known = objectives()
    if name not in known:
        raise UnknownName(f"no objective is called {name!r}. {nearest(name, known)}")
    kind, given = known[name], options or {}
    options_of = {field.name: field for field in fields(kind)}
    for key in given:
        if key not in options_of:
            raise UnknownName(f"{name} has no option {key!r}. {nearest(key, options_of)}")
    missing = [key for key, field in options_of.items() if field.default is MISSING and key not in given]
    if missing:
        raise BadOption(f"{name} needs {', '.join(missing)}")
    return kind(**given)


def distinct(names: Iterable[str]) -> tuple[str, ...]:
    """The names; BadOption where one comes twice."""
    found = tuple(names)
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise BadOption(f"objective given twice: {', '.join(twice)}; parts of the loss go by name")
    return found
