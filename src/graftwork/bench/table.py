"""What a part of the benchmark finds: tables of figures, goals reached or not, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Cell = str | float | int | None
REACHED, MISSED, UNKNOWN = "reached", "not reached", "not measured"


@dataclass(frozen=True)
class Goal:
    """A limit that a figure should not exceed.

    Attributes:
        what: what is measured.
        limit: the highest value that will do.
        figure: what was measured, None where it could not be (the reason stands in the table's notes).
        unit: behind both numbers.
    """

    what: str
    limit: float
    figure: float | None
    unit: str = ""

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return UNKNOWN
        return REACHED if self.figure <= self.limit else MISSED


@dataclass
class Table:
    """Figures of one part on one host.

    Attributes:
        part, title: which measurement, on what.
        headings: of the columns; the first holds names.
        rows: numbers as measured; `shown` says how they are printed.
        notes: what a reader must know, failures among it.
        goals: limits held against figures of this table.
    """

    part: str
    title: str
    headings: tuple[str, ...]
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As JSON keeps it, verdicts included."""
        return {**asdict(self), "goals": [{**asdict(goal), "verdict": goal.verdict} for goal in self.goals]}


def shown(cell: Cell) -> str:
    """Three significant digits for measured numbers, whole numbers in full, nothing for None."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def goal_rows(tables: Sequence[Table]) -> list[tuple[str, ...]]:
    """(part, what, figure, limit, verdict) of every goal."""
    return [
        (
            table.part,
            goal.what,
            _with_unit(goal.figure, goal.unit),
            _with_unit(goal.limit, goal.unit),
            goal.verdict,
        )
        for table in tables
        for goal in table.goals
    ]


def _with_unit(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.5g} {unit}".rstrip()


GOAL_HEADINGS = ("part", "goal", "figure", "at most", "")


def rich_table(table: Table) -> RichTable:
    """For the terminal."""
    cells = [[shown(cell) for cell in row] for row in table.rows]
    return _rich(f"{table.part}: {table.title}", table.headings, cells)


def rich_goals(tables: Sequence[Table]) -> RichTable:
    """All goals, for the terminal."""
    colour = {REACHED: "green", MISSED: "red", UNKNOWN: "yellow"}
    rows = [(*row[:-1], f"[{colour[row[-1]]}]{row[-1]}[/]") for row in goal_rows(tables)]
    return _rich("Goals", GOAL_HEADINGS, rows)


def _rich(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable

    out = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, header_style="bold")
    for number, heading in enumerate(headings):
        out.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        out.add_row(*row)
    return out


def markdown(tables: Sequence[Table], machine: Mapping[str, object]) -> str:
    """A page's worth: the machine, the goals, every table with its notes."""
    facts = "; ".join(f"{name} {value}" for name, value in machine.items())
    parts = [f"Measured on: {facts}."]
    if goals := goal_rows(tables):
        parts += ["### Goals", markdown_table(GOAL_HEADINGS, goals)]
    for table in tables:
        cells = [[shown(cell) for cell in row] for row in table.rows]
        parts += [f"### {table.part}: {table.title}", markdown_table(table.headings, cells)]
        parts += ["\n".join(f"- {note}" for note in table.notes)] if table.notes else []
    return "\n\n".join(parts) + "\n"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One Markdown table; numbers to the right."""
    rule = ["---", *("---:" for _ in headings[1:])]
    lines = [list(headings), rule, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
