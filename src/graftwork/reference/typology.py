"""The typology as something to read: each technique's nine properties, its options, what sets two apart.

Everything comes from the card, the option annotations and the docstrings; nothing is written twice.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from graftwork.reference.card import Card
from graftwork.reference.catalogue import technique_class, techniques
from graftwork.reference.technique import Technique, default_of

PROPERTIES: dict[str, Callable[[Card], str]] = {
    "intra-connectivity": lambda card: card.intra_connectivity.value,
    "inter-connectivity": lambda card: card.inter_connectivity.value,
    "parameters adapted": lambda card: card.adaptation.value,
    "parameter sharing": lambda card: card.sharing.value,
    "input type": lambda card: card.input.value,
    "insertion form": lambda card: card.insertion.value,
    "number of insertions": lambda card: card.insertions.value,
    "integration form": lambda card: card.integration.value,
    "workspace": lambda card: ", ".join(card.workspaces),
}
FACTS: dict[str, Callable[[Card], str]] = {
    "port": lambda card: card.port.value,
    "merges into the base": lambda card: _yes(card.linear),
    "identity when attached": lambda card: _yes(card.identity_at_init),
    "routes per token": lambda card: _yes(card.token_wise),
}


@dataclass(frozen=True)
class Option:
    """One option of a technique: name, default and possible values as text, and what it means."""

    name: str
    default: str
    values: str
    meaning: str


@dataclass(frozen=True)
class Sheet:
    """All there is to say about one technique.

    Attributes:
        name: kebab name (recipes, command line, files); kind: its class's name.
        text: the docstring of its file (idea, paper, formula, what holds at the start).
        formula, parameters, citation: as on the card.
        properties: the nine of PEFT-Ref; facts: what the engine relies on.
        options: its configuration.
    """

    name: str
    kind: str
    text: str
    formula: str
    parameters: str
    citation: str
    properties: dict[str, str]
    facts: dict[str, str]
    options: tuple[Option, ...]


def sheet(technique: str | type[Technique]) -> Sheet:
    """The sheet of a technique, by its class or its name; raises UnknownName with the nearest names."""
    kind = technique_class(technique) if isinstance(technique, str) else technique
    card = kind.published
    return Sheet(
        name=kind.name,
        kind=kind.__name__,
        text=inspect.cleandoc(sys.modules[kind.__module__].__doc__ or kind.__doc__ or ""),
        formula=card.formula,
        parameters=card.parameters,
        citation=card.citation,
        properties={name: read(card) for name, read in PROPERTIES.items()},
        facts={name: read(card) for name, read in FACTS.items()} | {"adds up as": kind.arithmetic.words()},
        options=options(kind),
    )


def describe(technique: str | type[Technique]) -> str:
    """One technique as plain text: formula, parameter count, properties, options with defaults, citation."""
    about = sheet(technique)
    heads = {"formula": about.formula, "parameters": about.parameters, "citation": about.citation}
    option_rows = [(o.name, o.default, o.values, o.meaning) for o in about.options]
    blocks = [
        f"{about.name} ({about.kind})\n\n{about.text}",
        _columns(list(heads.items())),
        "properties\n" + _columns(list(about.properties.items())),
        "in the engine\n" + _columns(list(about.facts.items())),
        "options\n" + _columns(option_rows),
    ]
    return "\n\n".join(blocks)


def compare(first: str | Technique, second: str | Technique) -> dict[str, tuple[str, str]]:
    """The properties, and then the engine's facts, in which two techniques differ: name -> (first, second).

    Takes names, or instances when options and overrides are to count.
    """
    cards = _card(first), _card(second)
    values = {name: (read(cards[0]), read(cards[1])) for name, read in (PROPERTIES | FACTS).items()}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


def table() -> dict[str, dict[str, str]]:
    """The typology: technique -> property -> value, for everything registered.

    Workspaces in the terms of the reference architecture: the parts of a layer (or all), first choices only.
    """
    kinds = techniques()
    return {
        name: sheet(kind).properties | {"workspace": _parts(kind.published)} for name, kind in kinds.items()
    }


def options(kind: type[Technique]) -> tuple[Option, ...]:
    """The options of a technique, its own first, then those that every technique has."""
    hints = get_type_hints(kind, include_extras=True)
    meanings = _meanings(kind)
    common = {option.name for option in fields(Technique)}
    found = sorted(fields(kind), key=lambda option: option.name in common)
    return tuple(
        Option(o.name, _shown(default_of(o)), _values(hints[o.name]), meanings.get(o.name, "")) for o in found
    )


def _card(of: str | Technique) -> Card:
    return technique_class(of).published if isinstance(of, str) else of.card


def _meanings(kind: type[Technique]) -> dict[str, str]:
    """Option -> text, from the `Args:` block of the class and of those it extends."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, arguments = inspect.cleandoc(base.__doc__ or "").partition("\nArgs:\n")
        for names, text in re.findall(r"^ {4}([\w, ]+): (.*(?:\n {5,}.*)*)", arguments, flags=re.MULTILINE):
            found |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return found


def _values(hint: Any) -> str:
    inner = get_args(hint)
    if get_origin(hint) is Annotated:
        return ", ".join([_values(inner[0]), *map(str, inner[1:])])
    if get_origin(hint) is Literal:
        return " | ".join(map(str, inner))
    if get_origin(hint) is Mapping:
        return f"{_values(inner[0])}: {_values(inner[1])}"
    if get_origin(hint) is tuple:
        return "names" if inner[0] is str else "numbers"
    if inner:
        return " or ".join(_values(kind) for kind in inner if kind is not NoneType)
    return _NOUNS.get(hint) or " | ".join(member.value for member in hint)


_NOUNS = {int: "whole number", float: "number", bool: "true | false", str: "text"}


def _shown(default: Any) -> str:
    return "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _parts(card: Card) -> str:
    first = (entry.partition("|")[0].rstrip("?").removeprefix("encoder.") for entry in card.workspaces)
    return ", ".join(dict.fromkeys("all" if name == "*" else name.partition(".")[0] for name in first))


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as aligned text, two spaces between columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)
