"""The studies by name: each file of `studies/papers` holds one as STUDY."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from graftwork.errors import UnknownName, nearest
from graftwork.studies import papers
from graftwork.studies.study import Study


def names() -> list[str]:
    """Of all studies, sorted; nothing is imported for it."""
    return sorted(found.name.replace("_", "-") for found in pkgutil.iter_modules(papers.__path__))


def study(name: str) -> Study:
    """A study by its name; UnknownName for one that does not exist."""
    if name not in names():
        raise UnknownName(f"no study is called {name!r}. {nearest(name, names())}")
    found: Study = importlib.import_module(f"{papers.__name__}.{name.replace('-', '_')}").STUDY
    return found


def store(folder: Path, name: str, size: str) -> Path:
    """The file that keeps the cells of a study."""
    return folder / f"{name}-{size}.jsonl"
