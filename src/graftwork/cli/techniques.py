"""`graftwork techniques`: the typology table, one card, or what sets two techniques apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from graftwork.errors import BadOption

if TYPE_CHECKING:
    from rich.console import RenderableType

HELP = "None: the table of all techniques. One name: its card. Two: the properties in which they differ."


_WIDE = 144
Names = Annotated[list[str] | None, typer.Argument(metavar="NAME", help=HELP)]


def show(names: Names = None) -> None:
    """Print the typology of all techniques, one technique's card, or the difference of two."""
    from rich.console import Console

    console = Console()
    console.print(rendered(names or [], console.width))


def rendered(names: list[str], width: int = 80) -> RenderableType:
    """What `graftwork techniques NAMES` prints on a terminal of that width."""
    if len(names) > 2:
        raise BadOption(f"techniques takes no, one or two names, not {len(names)}: {', '.join(names)}")
    if len(names) == 2:
        return difference(*names)
    return card(*names) if names else typology(width)


def typology(width: int) -> RenderableType:
    """All techniques and their properties; a property on which all agree goes below the table.

    A narrow terminal gets the properties of a technique in one cell.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from graftwork.reference.typology import PROPERTIES, table

    rows = table()
    values = {name: {row[name] for row in rows.values()} for name in PROPERTIES}
    common = {name: found.pop() for name, found in values.items() if len(found) == 1}
    shown = [name for name in PROPERTIES if name not in common]
    caption = "; ".join(f"{name} of all: {value}" for name, value in common.items())
    headings = [name.replace(" ", "\n").replace("-", "-\n") for name in shown]
    narrow = width < _WIDE
    headings = [" · ".join(shown)] if narrow else headings
    view = Table("technique", *headings, caption=caption or None, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.columns[0].no_wrap = True
    for technique, row in rows.items():
        cells = [row[name] for name in shown]
        view.add_row(f"[bold]{technique}[/]", *([" · ".join(cells)] if narrow else cells))
    return view


def card(name: str) -> RenderableType:
    """One technique: idea, formula, parameter count, properties, options with defaults, citation."""
    from rich.console import Group
    from rich.markdown import Markdown

    from graftwork.reference.typology import sheet

    about = sheet(name)
    heads = {"formula": about.formula, "parameters": about.parameters, "citation": about.citation}
    options = [(o.name, o.default, o.values, o.meaning) for o in about.options]
    return Group(
        Markdown(f"# {about.name}\n\n{about.text}"),
        _pairs("", heads),
        _pairs("properties", about.properties),
        _pairs("in the engine", about.facts),
        _grid("options", ("option", "default", "values", "meaning"), options),
    )


def difference(first: str, second: str) -> RenderableType:
    """The properties in which two techniques differ."""
    from graftwork.reference.typology import compare

    rows = [(name, *pair) for name, pair in compare(first, second).items()]
    if not rows:
        return f"{first} and {second} have the same properties"
    return _grid("", ("property", first, second), rows)


def _pairs(title: str, values: dict[str, str]) -> RenderableType:
    return _grid(title, (), list(values.items()))


def _grid(title: str, headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> RenderableType:
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    view = Table(*headings, title=title or None, title_justify="left", box=SIMPLE, show_header=bool(headings))
    for row in rows:
        view.add_row(*(escape(cell) for cell in row))
    return view
