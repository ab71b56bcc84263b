"""Pydantic's findings on a recipe, in the words of its user: the path, what is wrong, the nearest key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from graftwork.errors import nearest

MAPPINGS = ("contexts",)  # sections whose keys are names of the user's own


def describe(error: ValidationError, root: type[BaseModel], values: Mapping[str, Any], origin: str) -> str:
    """One line per finding; the first line says which recipe."""
    several = isinstance(values.get("technique"), list)
    lines = dict.fromkeys(_line(finding, root, several) for finding in error.errors())
    return f"{origin} is not a valid recipe:\n" + "\n".join(f"  {line}" for line in lines)


def _line(finding: Any, root: type[BaseModel], several: bool) -> str:
    path = _path(finding["loc"], several)
    kind, value = finding["type"], finding["input"]
    if kind == "extra_forbidden":
        return f"{path}: there is no such key. {nearest(path, _known(path, root))}"
    if kind == "missing":
        return f"{path}: missing"
    if kind == "value_error":
        return f"{path}: {finding['ctx']['error']}" if path else str(finding["ctx"]["error"])
    return f"{path}: {finding['msg'][0].lower()}{finding['msg'][1:]}, not {value!r}"


def _path(location: tuple[Any, ...], several: bool) -> str:
    """Dotted path without what pydantic adds for unions (`Annotated[...]`, `literal[...]`, `int`)."""
    parts = [str(part) for part in location if not _is_branch(part)]
    if not several and parts[:2] == ["technique", "0"]:
        parts = ["technique", *parts[2:]]
    return ".".join(parts)


def _is_branch(part: Any) -> bool:
    return isinstance(part, str) and ("[" in part or part in {"int", "float", "str", "none"})


def _known(path: str, root: type[BaseModel]) -> list[str]:
    """The keys beside an unknown one; for a key without section all keys of all sections."""
    every = _leaves(root)
    section = path.rpartition(".")[0]
    parts = f"{section}.".split(".")[:-1]
    beside = [leaf for leaf in (_inside(parts, leaf) for leaf in every) if leaf]
    return beside if section else [*root.model_fields, *every]


def _inside(section: list[str], leaf: str) -> str | None:
    """The leaf as a key of that section, whose own names stand where the leaf has `*`; None for one of another."""
    parts = leaf.split(".")
    fits = len(parts) > len(section) and all(a in (b, "*") for a, b in zip(parts, section, strict=False))
    return ".".join([*section, *parts[len(section) :]]) if fits else None


def _leaves(section: type[BaseModel], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, field in section.model_fields.items():
        inner = next((kind for kind in _kinds(field.annotation) if issubclass(kind, BaseModel)), None)
        below = f"{prefix}{name}.*." if name in MAPPINGS else f"{prefix}{name}."
        found += _leaves(inner, below) if inner else [f"{prefix}{name}"]
    return found


def _kinds(annotation: Any) -> list[type]:
    if isinstance(annotation, type):
        return [annotation]
    return [kind for argument in get_args(annotation) for kind in _kinds(argument)]
