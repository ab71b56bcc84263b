"""All techniques that exist, by name. A file in `techniques/` is found by itself; others call `register`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, TypeVar

from graftwork.errors import BadOption, UnknownName, nearest
from graftwork.reference.technique import Technique, from_options

_registered: dict[str, type[Technique]] = {}
T = TypeVar("T", bound=Technique)


def register(kind: type[T]) -> type[T]:
    """Class decorator: make a technique known by its kebab name to recipes, files and the command line."""
    known = _registered.get(kind.name)
    if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise BadOption(
            f"a technique named {kind.name!r} exists already ({known.__module__}.{known.__qualname__})"
        )
    if not getattr(kind, "published", None):
        raise BadOption(f"{kind.__name__} has no card: set `published = Card(...)`")
    _registered[kind.name] = kind
    return kind


def techniques() -> Mapping[str, type[Technique]]:
    """Name -> class of every known technique, sorted by name."""
    package = importlib.import_module("graftwork.techniques")
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"graftwork.techniques.{found.name}")
    return dict(sorted(_registered.items()))


def technique_class(name: str) -> type[Technique]:
    """The class of a technique by its kebab name."""
    known = techniques()
    if name not in known:
        raise UnknownName(f"no technique is called {name!r}. {nearest(name, known)}")
    return known[name]


def make(name: str, options: Mapping[str, Any] | None = None) -> Technique:
    """A technique from its name and plain option values, as a recipe or an adapter file spells it."""
    return from_options(technique_class(name), options or {})
