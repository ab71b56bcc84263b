"""The learning rate an arm runs at: the best of a few, tried with one seed, chosen alike for every arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from graftwork.studies.cells import Cell
from graftwork.studies.findings import Table

Searched = Mapping[str, Mapping[float, Cell]]


def try_rates(
    measure: Callable[[str, int, float], Cell], rates: Mapping[str, Sequence[float]], seed: int
) -> dict[str, dict[float, Cell]]:
    """Each arm at each of its rates: the cells of `measure(arm, seed, rate)`."""
    return {arm: {rate: measure(arm, seed, rate) for rate in own} for arm, own in rates.items()}


def best_rate(by_rate: Mapping[float, Cell]) -> float:
    """The rate with the highest `choice score`, where there is one, and the lowest `choice loss` among equals."""

    def worth(rate: float) -> tuple[float, float]:
        figures = by_rate[rate].figures
        loss = figures["choice loss"]
        return figures.get("choice score", 0.0), -loss if math.isfinite(loss) else -math.inf

    return max(by_rate, key=worth)


def best_rates(searched: Searched) -> dict[str, float]:
    """The best rate of each arm."""
    return {arm: best_rate(by_rate) for arm, by_rate in searched.items()}


def losses_table(searched: Searched, seed: int) -> Table:
    """The `choice loss` of each arm at each rate; empty where an arm was not tried."""
    rates = sorted({rate for by_rate in searched.values() for rate in by_rate})
    rows = [
        [arm, *(_shown(by_rate[rate].figures["choice loss"]) if rate in by_rate else "" for rate in rates)]
        for arm, by_rate in searched.items()
    ]
    title = f"Choosing the rate: held-out loss, seed {seed}"
    return Table(title, ["", *(f"{rate:g}" for rate in rates)], rows)


def _shown(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"
