"""`graftwork docs`: the pages about techniques, written from cards, docstrings and defaults."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftwork.errors import BadData

if TYPE_CHECKING:
    from graftwork.reference.technique import Technique

BEGIN, END = "<!-- techniques: begin -->", "<!-- techniques: end -->"


def docs(
    folder: Annotated[Path, typer.Argument(help="Where the pages go.")] = Path("docs/techniques"),
    readme: Annotated[Path, typer.Option(help="Page whose marked table is renewed, if it has one.")] = Path(
        "README.md"
    ),
) -> None:
    """Write a page per technique, their index, and the table in the README."""
    written = write(folder)
    if readme.exists() and BEGIN in readme.read_text(encoding="utf-8"):
        renew(readme, folder)
        written.append(readme)
    typer.echo(f"wrote {len(written)} pages: {folder}/*.md" + (f", {readme}" if readme in written else ""))


def write(folder: Path) -> list[Path]:
    """Write NAME.md for each of the package's own techniques, and README.md as their index."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {f"{name}.md": page(kind) for name, kind in own().items()}
    pages["README.md"] = f"# Techniques\n\nWritten by `graftwork docs`.\n\n{technique_table('')}"
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in pages]


def renew(readme: Path, folder: Path) -> None:
    """Replace the table between the two markers of a page; its links lead to `folder`."""
    text = readme.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise BadData(f"{readme} needs the two lines {BEGIN} and {END}, in this order, around the table")
    inside = technique_table(f"{folder.as_posix()}/")
    readme.write_text(f"{head}{BEGIN}\n{inside}{END}{tail}", encoding="utf-8")


def own() -> dict[str, type[Technique]]:
    """The techniques that come with the package, by name."""
    from graftwork.reference.catalogue import techniques

    return {name: kind for name, kind in techniques().items() if kind.__module__.startswith("graftwork.")}


def page(kind: type[Technique]) -> str:
    """The page of one technique, in Markdown."""
    from graftwork.reference.typology import sheet

    about = sheet(kind)
    title, _, text = about.text.partition("\n\n")
    call = f"gw.{about.kind}({kind.example})"
    options = [(f"`{o.name}`", f"`{o.default}`", o.values, o.meaning) for o in about.options]
    parts = [
        f"# {about.kind}",
        title,
        text,
        f"    {about.formula}",
        f"Parameters: {about.parameters}.",
        f"```python\ngw.attach(model, {call})\n```\n\n```\ngraftwork techniques {about.name}\n```",
        "## Options\n\n" + table(("option", "default", "values", "meaning"), options),
        "## Properties\n\n" + table(("property", "value"), list((about.properties | about.facts).items())),
        f"## Source\n\n{about.citation}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def technique_table(to: str) -> str:
    """All techniques in one Markdown table, each linked to its page below `to`."""
    from graftwork.reference.typology import sheet

    rows = []
    for name, kind in own().items():
        about = sheet(kind)
        idea = about.text.partition("\n")[0].rstrip(".")
        links = f"[`{name}`]({to}{name}.md)"
        rows.append((links, idea, about.facts["port"], about.facts["merges into the base"]))
    return table(("name", "technique", "port", "merges"), rows) + "\n"


def table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
