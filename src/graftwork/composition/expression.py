"""Expressions over adapters: `a + 0.5*b - toxic`.

    sum     = [+|-] product { (+|-) product }
    product = factor { * factor | / factor }
    factor  = number | name | 'name' | "name" | ( sum ) | (+|-) factor

Each product has at most one part with adapters in it, so that the whole is a weighted sum. A name has letters, digits,
`_` and `.`; any other, a path for instance, stands in quotes. A name that appears twice stays two summands.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from graftwork.errors import BadOption

Terms = list[tuple[float, str]]
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)(?![\w.])"
    r"|(?P<name>[A-Za-z_][\w.]*)|'(?P<single>[^']+)'|\"(?P<double>[^\"]+)\"|(?P<sign>[-+*/()]))"
)
DEEPEST = 50


def parse(text: str) -> Terms:
    """The weighted names in their order. Raises BadOption, which says where in the text it went wrong."""
    reader = _Reader(text, _tokens(text))
    value = reader.sum()
    if reader.here.kind != "end":
        raise reader.error(f"unexpected {reader.here.text!r}")
    if isinstance(value, float):
        raise BadOption(f"the expression {text!r} names no adapter")
    return value


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int


def _tokens(text: str) -> list[_Token]:
    found, position = [], 0
    end = len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            start = position + len(text[position:]) - len(text[position:].lstrip())
            raise BadOption(_at(text, start, f"{text[start : start + 12]!r} is no number, name or operator"))
        kind = match.lastgroup or ""
        found.append(_Token("name" if kind in ("single", "double") else kind, match[kind], match.start(kind)))
        position = match.end()
    return [*found, _Token("end", "the end", end)]


class _Reader:
    """Recursive descent; a value is a number, or weighted names."""

    def __init__(self, text: str, tokens: list[_Token]) -> None:
        self.text, self.tokens, self.position, self.depth = text, tokens, 0, 0

    @property
    def here(self) -> _Token:
        return self.tokens[self.position]

    def error(self, what: str) -> BadOption:
        return BadOption(_at(self.text, self.here.start, what))

    def take(self, *signs: str) -> str:
        """The operator here, if it is one of these; it is then behind us."""
        token = self.here
        if token.kind != "sign" or token.text not in signs:
            return ""
        self.position += 1
        return token.text

    def sum(self) -> float | Terms:
        value = self.product()
        while sign := self.take("+", "-"):
            other = self.product()
            factor = -1.0 if sign == "-" else 1.0
            if isinstance(value, float) and isinstance(other, float):
                value += factor * other
            elif isinstance(value, list) and isinstance(other, list):
                value = value + _scaled(other, factor)
            else:
                raise self.error("a number cannot be added to an adapter; multiply them")
        return value

    def product(self) -> float | Terms:
        value = self.factor()
        while sign := self.take("*", "/"):
            other = self.factor()
            if sign == "/":
                if not isinstance(other, float) or other == 0:
                    raise self.error("only a number other than 0 can divide")
                other = 1 / other
            if isinstance(other, float):
                value = value * other if isinstance(value, float) else _scaled(value, other)
            elif isinstance(value, float):
                value = _scaled(other, value)
            else:
                raise self.error("two adapters cannot be multiplied")
        return value

    def factor(self) -> float | Terms:
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.error(f"more than {DEEPEST} levels of brackets and signs")
        value = self._factor()
        self.depth -= 1
        return value

    def _factor(self) -> float | Terms:
        if sign := self.take("+", "-"):
            value, factor = self.factor(), -1.0 if sign == "-" else 1.0
            return value * factor if isinstance(value, float) else _scaled(value, factor)
        if self.take("("):
            value = self.sum()
            if not self.take(")"):
                raise self.error("a ')' is missing")
            return value
        token = self.here
        if token.kind not in ("number", "name"):
            raise self.error(f"expected a number, a name or '(', found {token.text!r}")
        self.position += 1
        return [(1.0, token.text)] if token.kind == "name" else self._number(token)

    def _number(self, token: _Token) -> float:
        if not math.isfinite(float(token.text)):
            raise self.error(f"{token.text} is too large")
        return float(token.text)


def _scaled(terms: Terms, factor: float) -> Terms:
    return [(factor * weight, name) for weight, name in terms]


def _at(text: str, start: int, what: str) -> str:
    return f"{what}, at position {start + 1} of the expression\n  {text}\n  {' ' * start}^"
