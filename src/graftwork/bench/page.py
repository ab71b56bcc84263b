"""A page with marked sections, one per device, that a run renews."""

from __future__ import annotations

from pathlib import Path

from graftwork.errors import BadData


def marks(section: str) -> tuple[str, str]:
    """The two lines around a section."""
    return f"<!-- bench {section}: begin -->", f"<!-- bench {section}: end -->"


def renew(page: Path, section: str, inside: str) -> None:
    """Replace what stands between the marks of a section.

    Raises BadData when the page lacks the marks; nothing is written then.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    first, last = marks(section)
    head, begin, rest = text.partition(first)
    _, end, tail = rest.partition(last)
    if not (begin and end):
        raise BadData(f"{page} needs the two lines {first} and {last}, in this order, around what is written")
    page.write_text(f"{head}{first}\n\n{inside}\n{last}{tail}", encoding="utf-8")
