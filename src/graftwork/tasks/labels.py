"""Label names learnt from training rows, and rows turned into label numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from graftwork.errors import BadData


def label_names(values: Iterable[Any], origin: str) -> tuple[str, ...]:
    """The distinct labels as text; whole numbers in numeric order, everything else in alphabetic order."""
    names = sorted({spelled(value) for value in values}, key=_order)
    if len(names) < 2:
        raise BadData(f"{origin}: classification needs two labels or more, found {names}")
    return tuple(names)


def label_numbers(values: Sequence[Any], labels: Sequence[str], origin: str) -> list[int]:
    """Numbers of these labels; BadData that lists labels which training never saw."""
    known = {label: number for number, label in enumerate(labels)}
    unseen: dict[str, int] = {}
    for row, value in enumerate(values):
        if spelled(value) not in known:
            unseen.setdefault(spelled(value), row)
    if unseen:
        some = ", ".join(f"{label!r} (row {row})" for label, row in list(unseen.items())[:5])
        raise BadData(
            f"{origin}: {len(unseen)} label(s) unseen in train: {some}. Known: {', '.join(labels)[:300]}. "
            "Drop these rows or add such rows to the training part."
        )
    return [known[spelled(value)] for value in values]


def spelled(value: Any) -> str:
    """A label as text: 1, 1.0, numpy's 1 and "1" are one label, whatever file they came from."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _order(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.lstrip("-").isdecimal() else (1, 0, name)
