"""Which layers of a stack are meant: "all", (0, -1), "2-5", "last 4", "first 2", "every 2"."""

from __future__ import annotations

import re

from graftwork.errors import BadOption

Layers = str | tuple[int, ...]
_FORMS = '"all", numbers such as (0, -1), "2-5", "last 4", "first 2" or "every 2" (layers 0, 2, 4, ...)'


def chosen_layers(layers: Layers, count: int) -> frozenset[int]:
    """The layer numbers that `layers` means in a stack of `count` layers; BadOption when out of range."""
    if not isinstance(layers, str):
        return frozenset(_number(n, count, layers) for n in layers)
    if layers.strip() == "all":
        return frozenset(range(count))
    span = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", layers)
    if span:
        return _span(int(span[1]), int(span[2]), count, layers)
    word = re.fullmatch(r"\s*(first|last|every)\s+(\d+)\s*", layers)
    if word:
        return _counted(word[1], int(word[2]), count, layers)
    if re.fullmatch(r"\s*-?\d+\s*", layers):
        return frozenset({_number(int(layers), count, layers)})
    raise BadOption(f"layers={layers!r} is not understood; write {_FORMS}")


def _number(number: int, count: int, layers: Layers) -> int:
    if not -count <= number < count:
        raise BadOption(
            f"layers={layers!r}: there is no layer {number}; the stack has layers 0 to {count - 1}"
        )
    return number % count


def _span(low: int, high: int, count: int, layers: str) -> frozenset[int]:
    if low > high or high >= count:
        raise BadOption(f"layers={layers!r} is no range within layers 0 to {count - 1}")
    return frozenset(range(low, high + 1))


def _counted(word: str, number: int, count: int, layers: str) -> frozenset[int]:
    if not 1 <= number <= count:
        raise BadOption(
            f"layers={layers!r}: the number must lie between 1 and {count}, the layers of the stack"
        )
    if word == "every":
        return frozenset(range(0, count, number))
    return frozenset(range(number) if word == "first" else range(count - number, count))
