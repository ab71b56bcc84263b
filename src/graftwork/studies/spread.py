"""Figures over seeds: mean, standard deviation, and whether two arms can be told apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graftwork.studies.cells import Cell


@dataclass(frozen=True)
class Spread:
    """Values of one figure over seeds.

    Attributes:
        mean: of all values; NaN where one is not finite.
        deviation: sample standard deviation (n - 1); 0 for a single value.
        count: number of values.
        failed: how many are not finite.
    """

    mean: float
    deviation: float
    count: int
    failed: int = 0

    def text(self, digits: int = 3, factor: float = 1.0) -> str:
        """`0.812 ± 0.018`, the mean alone for one value, or how many runs diverged."""
        if self.failed:
            return f"{self.failed} of {self.count} diverged"
        mean = f"{self.mean * factor:,.{digits}f}"
        return mean if self.count == 1 else f"{mean} ± {self.deviation * factor:,.{digits}f}"


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation; ValueError for no value."""
    if not values:
        raise ValueError("no value to take the mean of")
    failed = sum(not math.isfinite(value) for value in values)
    if failed:
        return Spread(math.nan, math.nan, len(values), failed)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(statistics.fmean(values), deviation, len(values))


def over_seeds(cells: Sequence[Cell], figure: str) -> Spread:
    """The spread of a figure over cells of one arm and task."""
    return spread([cell.figures[figure] for cell in cells])


@dataclass(frozen=True)
class Difference:
    """First arm less second arm, paired by seed.

    Attributes:
        spread: of the differences.
        clear: whether zero is outside the 95 % interval of the mean difference (Student's t on the pairs); never
            with one seed.
    """

    spread: Spread
    clear: bool

    @property
    def sign(self) -> int:
        """1 or -1 for a clear difference, 0 where the arms are not told apart."""
        return int(math.copysign(1, self.spread.mean)) if self.clear else 0


def difference(first: Sequence[Cell], second: Sequence[Cell], figure: str) -> Difference:
    """How the figure of one arm differs from another's on the same task; both have cells of the same seeds.

    Raises ValueError where the seeds differ.
    """
    return paired(first, second, lambda cell: cell.figures[figure])


def paired(first: Sequence[Cell], second: Sequence[Cell], value: Callable[[Cell], float]) -> Difference:
    """As `difference`, of a value computed from each cell."""
    one, other = ({cell.seed: value(cell) for cell in cells} for cells in (first, second))
    if one.keys() != other.keys():
        raise ValueError(f"seeds {sorted(one)} and {sorted(other)} cannot be paired")
    found = spread([one[seed] - other[seed] for seed in sorted(one)])
    return Difference(found, _clear(found))


def _clear(found: Spread) -> bool:
    from scipy.stats import t

    if found.failed or found.count < 2 or found.mean == 0:
        return False
    error = found.deviation / math.sqrt(found.count)
    return abs(found.mean) > float(t.ppf(0.975, found.count - 1)) * error
