"""What a study found: a verdict, tables, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from graftwork.studies.cells import Cell, Line
from graftwork.studies.spread import over_seeds


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: what it shows.
        headings: of the columns; the first holds names.
        rows: as printed.
        notes: sentences below it.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Curve:
    """One arm's line: points (x, y), and how far y spreads over seeds at each point."""

    arm: str
    points: Line
    deviation: Sequence[float] = ()


@dataclass(frozen=True)
class Plot:
    """Curves in one pair of axes."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a page says beyond the claim.

    Attributes:
        verdict: whether the claim appeared, computed from the figures; one or more sentences of Markdown.
        method: what was done, with the numbers of this run; Markdown.
        tables: in order.
        plots: side by side in one picture; none, no picture.
    """

    verdict: str
    method: str
    tables: Sequence[Table]
    plots: Sequence[Plot] = field(default=())


@dataclass(frozen=True)
class Column:
    """How a figure is shown: heading, figure, digits behind the point, a factor for another unit."""

    heading: str
    figure: str
    digits: int = 3
    factor: float = 1.0


def mean_table(title: str, arms: Mapping[str, Sequence[Cell]], columns: Sequence[Column]) -> Table:
    """Mean and standard deviation over seeds: a row for each arm, a column for each figure."""
    rows = [
        [arm, *(over_seeds(cells, c.figure).text(c.digits, c.factor) for c in columns)]
        for arm, cells in arms.items()
    ]
    return Table(title, ["", *(column.heading for column in columns)], rows)


def mean_curve(arm: str, cells: Sequence[Cell], curve: str) -> Curve:
    """The mean of a curve over seeds, where all have a point, and its standard deviation there."""
    from graftwork.studies.spread import spread

    lines = [dict(cell.curves[curve]) for cell in cells]
    shared = sorted(set.intersection(*(set(line) for line in lines)))
    found = [spread([line[x] for line in lines]) for x in shared]
    return Curve(arm, [(x, s.mean) for x, s in zip(shared, found, strict=True)], [s.deviation for s in found])
