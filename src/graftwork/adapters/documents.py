"""JSON from files that nobody vouches for: bounded, no duplicate keys, no NaN; and typed access to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from graftwork.errors import BadFile

LONGEST = 16 * 2**20

T = TypeVar("T")


def parse(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object. `where` says in errors what was read. Raises BadFile on anything else."""
    if len(text) > LONGEST:
        raise BadFile(f"{where}: {len(text)} characters of JSON, more than the {LONGEST} that are read")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise BadFile(f"{where}: JSON nested too deeply") from None
    except ValueError as error:
        raise BadFile(f"{where}: not valid JSON ({_short(str(error))})") from None
    if not isinstance(value, dict):
        raise BadFile(f"{where}: expected a JSON object, found a {type(value).__name__}")
    return value


def dump(value: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON text with sorted keys; the same value always gives the same text."""
    spacing = None if indent else (",", ":")
    return json.dumps(value, sort_keys=True, allow_nan=False, indent=indent, separators=spacing)


def take(document: Mapping[str, Any], key: str, kind: type[T], where: str) -> T:
    """`document[key]`, which must be there and be a `kind`."""
    if key not in document:
        raise BadFile(f"{where}: {key!r} is missing")
    value = document[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BadFile(f"{where}: {key!r} is a {type(value).__name__}, expected a {kind.__name__}")
    return value


def take_list(document: Mapping[str, Any], key: str, kind: type[T], where: str) -> list[T]:
    """`document[key]`, which must be a list of `kind`."""
    values = take(document, key, list, where)
    for value in values:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BadFile(f"{where}: {key!r} holds a {type(value).__name__}, expected only {kind.__name__}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."
