"""The standard library's docstrings, read from its sources by `ast`: no module is imported, no code runs."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from graftwork.data.subjects import SUBJECT_OF
from graftwork.errors import BadData

_LEFT_OUT = {
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages",
    "__pycache__", "pydoc_data", "__phello__",
}  # fmt: skip
_LEAST = 20  # characters; shorter texts say nothing ("Close it.")
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Docstring:
    """One docstring.

    Attributes:
        module: dotted name of the module.
        name: dotted name in the module (`Thread.join`), "" for the module's own.
        summary: first paragraph as one line.
        body: the rest, indentation removed; may be empty.
        subject: area of the library, None where the module serves all or none.
    """

    module: str
    name: str
    summary: str
    body: str
    subject: str | None

    @property
    def definition(self) -> str:
        """Module and top-level class or function that it belongs to."""
        return f"{self.module}:{self.name.partition('.')[0]}"

    @property
    def text(self) -> str:
        return f"{self.summary}\n\n{self.body}" if self.body else self.summary


@lru_cache(maxsize=1)
def collect() -> tuple[Docstring, ...]:
    """All docstrings in a fixed order, each text, summary and body once (the first stays)."""
    seen: set[str] = set()
    found = []
    for docstring in _all():
        body = docstring.body if len(docstring.body) >= _LEAST else docstring.text
        keys = {_normal(part) for part in (docstring.text, docstring.summary, body)}
        if len(docstring.text) >= _LEAST and not keys & seen:
            seen |= keys
            found.append(docstring)
    if not found:
        raise BadData(f"no sources of the standard library below {_root()}: this Python ships without them")
    return tuple(found)


def help_topics() -> list[tuple[str, str]]:
    """(name, text) of the help topics that Python ships; a paragraph of several stays in the first."""
    path = _root() / "pydoc_data" / "topics.py"
    if not path.is_file():
        return []
    seen: set[str] = set()
    kept = [(name, _new_paragraphs(text, seen)) for name, text in sorted(_dictionary(path).items())]
    return [(f"topic {name}", text) for name, text in kept if text]


def _new_paragraphs(text: str, seen: set[str]) -> str:
    new = []
    for paragraph in text.split("\n\n"):
        key = _normal(paragraph)
        if key and key not in seen:
            seen.add(key)
            new.append(paragraph.rstrip())
    return "\n\n".join(new)


def _dictionary(path: Path) -> dict[str, str]:
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


def _all() -> Iterator[Docstring]:
    root = _root()
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not _LEFT_OUT & set(inside.parts):
            yield from _of_module(path, ".".join(inside.with_suffix("").parts).removesuffix(".__init__"))


def _of_module(path: Path, module: str) -> Iterator[Docstring]:
    subject = SUBJECT_OF.get(module.partition(".")[0])
    for name, node in _documented(ast.parse(path.read_bytes()), ""):
        content = ast.get_docstring(node)
        if content:
            summary, _, body = content.partition("\n\n")
            yield Docstring(module, name, " ".join(summary.split()), body.strip("\n").rstrip(), subject)


def _documented(node: ast.Module | _Definition, name: str) -> Iterator[tuple[str, ast.Module | _Definition]]:
    yield name, node
    for child in node.body:
        if isinstance(child, _Definition):
            yield from _documented(child, f"{name}.{child.name}".lstrip("."))


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _normal(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()
