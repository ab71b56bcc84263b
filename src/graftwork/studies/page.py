"""A study's page: claim, verdict, how, command, tables, picture."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from graftwork.bench.table import markdown_table
from graftwork.studies.cells import Cell
from graftwork.studies.findings import Findings, Table
from graftwork.studies.picture import draw
from graftwork.studies.session import Session
from graftwork.studies.study import Settings, Study

_DEFAULT = Settings()


def write(study: Study, session: Session, findings: Findings, folder: Path) -> Path:
    """Write `NAME.md`, its picture and the cells behind it into a folder; return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    picture, cells = folder / f"{study.name}.png", folder / f"{study.name}.jsonl"
    if findings.plots:
        draw(findings.plots, picture)
    lines = "".join(cell.line() + "\n" for cell in session.used.values())
    place = folder / f"{study.name}.md"
    _put(cells, lines)
    _put(place, markdown(study, session, findings))
    return place


def markdown(study: Study, session: Session, findings: Findings) -> str:
    """The page's text; nothing in it depends on the day."""
    used = list(session.used.values())
    parts = [
        f"# {study.title}",
        f"**Source.** {study.source}.",
        f"**Claim.** {study.claim}",
        f"**Verdict.** {findings.verdict}",
        "## How",
        findings.method,
        f"```\n{command(study, session.settings)}\n```",
        _facts(used, session.settings),
        "## Result",
        *(_table(table) for table in findings.tables),
    ]
    if findings.plots:
        parts.append(f"![{'; '.join(plot.title for plot in findings.plots)}]({study.name}.png)")
    parts.append(f"Each measurement by itself: [{study.name}.jsonl]({study.name}.jsonl).")
    return "\n\n".join(parts) + "\n"


def command(study: Study, settings: Settings) -> str:
    """What to type to get this page again; the data folder is the reader's own."""
    words = ["graftwork", "study", study.name, "--seeds", ",".join(str(seed) for seed in settings.seeds)]
    words += ["--size", settings.size] if settings.size != _DEFAULT.size else []
    words += ["--data", "DATA"] if settings.data is not None else []
    return " ".join([*words, "--write", "docs/studies"])


def _facts(used: Sequence[Cell], settings: Settings) -> str:
    seeds = f"Seeds {', '.join(str(seed) for seed in settings.seeds)}"
    machines = "; ".join(_once(cell.machine for cell in used))
    libraries = "; ".join(_once(", ".join(f"{k} {v}" for k, v in cell.versions.items()) for cell in used))
    return (
        f"{seeds}. Measured on {machines}; {libraries}; {_duration(sum(cell.seconds for cell in used))} of "
        "processor time in all."
    )


def _once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _table(table: Table) -> str:
    body = f"### {table.title}\n\n{markdown_table(tuple(table.headings), [tuple(row) for row in table.rows])}"
    return "\n\n".join([body, *table.notes])


def _put(place: Path, text: str) -> None:
    draft = place.with_name(f".{place.name}.draft")
    draft.write_text(text, encoding="utf-8")
    shutil.move(draft, place)
