"""Orders that papers claim, held against figures: which arm is above which, task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graftwork.studies.cells import Cell
from graftwork.studies.findings import Table
from graftwork.studies.spread import Difference, difference

Order = tuple[str, str]  # the arm that a paper puts above, and the other
Pairs = Mapping[Order, Difference]


def pairs(cells: Mapping[str, Sequence[Cell]], orders: Sequence[Order], figure: str = "score") -> Pairs:
    """What the first arm of each order has over the second on one task; higher is better."""
    return {(above, below): difference(cells[above], cells[below], figure) for above, below in orders}


def summary(found: Mapping[str, Pairs]) -> str:
    """How many of the orders appeared over all tasks, and which were clear either way."""
    every = [(order, task, one) for task, by_order in found.items() for order, one in by_order.items()]
    kept = sum(one.spread.mean > 0 for _, _, one in every)
    clear, reversed_ = (
        [f"{above} over {below} on {task}" for (above, below), task, one in every if one.sign == sign]
        for sign in (1, -1)
    )
    return (
        f"Of {len(every)} comparisons that the papers order, {kept} have the papers' sign, {len(clear)} of them "
        f"clearly ({'; '.join(clear) or 'none'}); {len(reversed_)} are clearly reversed "
        f"({'; '.join(reversed_) or 'none'})."
    )


def table(found: Mapping[str, Pairs], factor: float = 100.0) -> Table:
    """A row for each order, a column for each task."""
    orders = next(iter(found.values()))
    rows = [
        [f"{above} over {below}", *(_shown(by_order[above, below], factor) for by_order in found.values())]
        for above, below in orders
    ]
    note = "Bold: clear, that is, zero is outside the 95 % interval of the mean difference."
    return Table("What the papers put above, paired by seed, in points", ["", *found], rows, [note])


def _shown(found: Difference, factor: float) -> str:
    text = found.spread.text(1, factor)
    return f"**{text}**" if found.clear else text
