"""`training.epochs=3` on the command line, laid over a recipe's values before they are checked."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from graftwork.errors import BadRecipe
from graftwork.training import yaml

NAMED = ("model", "technique", "task")


def override(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `dotted.path=value` set; a value is read as YAML (`null`, `1e-3`)."""
    changed = copy.deepcopy(dict(values))
    for assignment in overrides:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise BadRecipe(f"override {assignment!r} is not of the form section.key=value")
        _set(changed, path.strip().split("."), yaml.parse(text, f"override {assignment!r}"), assignment)
    return changed


def _set(values: dict[str, Any], path: Sequence[str], value: Any, assignment: str) -> None:
    place: Any = values
    for depth, part in enumerate(path[:-1]):
        place = _descend(place, part, ".".join(path[: depth + 1]), assignment)
    if isinstance(place, list):
        place[_index(place, path[-1], assignment)] = value
    else:
        place[path[-1]] = value


def _descend(place: Any, part: str, path: str, assignment: str) -> Any:
    if isinstance(place, list):
        index = _index(place, part, assignment)
        place[index] = inner = _opened(place[index], path, assignment)
        return inner
    place[part] = _opened(place.get(part, {}), path, assignment)
    return place[part]


def _opened(value: Any, path: str, assignment: str) -> Any:
    """What can be descended into: `technique: lora` opens as `{name: lora}`, `image: <image>` as its tokens."""
    parts = path.split(".")
    if isinstance(value, str) and (parts[0] in NAMED or parts[::2] == ["contexts", "technique"]):
        return {"name": value}
    if parts[0] == "contexts" and len(parts) == 2 and value is not None and not isinstance(value, dict):
        return {"tokens": value}
    if value is None:
        return {}
    if not isinstance(value, dict | list):
        raise BadRecipe(
            f"override {assignment!r}: {path} is a single value, {value!r}, with nothing below it"
        )
    return value


def _index(place: list[Any], part: str, assignment: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        known = ", ".join(str(number) for number in range(len(place)))
        raise BadRecipe(f"override {assignment!r}: {part!r} is no position in the list; there are {known}")
    return int(part)
