"""A study that takes no time: the figures are computed from arm and seed."""

from __future__ import annotations

from collections.abc import Callable

from graftwork.studies.cells import Measured
from graftwork.studies.findings import Column, Findings, Plot, mean_curve, mean_table
from graftwork.studies.session import Session
from graftwork.studies.spread import difference
from graftwork.studies.study import Study

HEIGHTS = {"oak": 20.0, "birch": 10.0}


def made_up(before: Callable[[str, int], None] = lambda arm, seed: None) -> Study:
    """`before` is called when a cell is really measured."""

    def grow(arm: str, seed: int) -> Measured:
        before(arm, seed)
        height = HEIGHTS[arm] + seed
        return Measured({"height": height}, {"growth": [(0, 0.0), (1, height)]})

    def run(session: Session) -> Findings:
        years = session.pick(small=1, full=9)
        arms = {
            arm: [
                session.cell(arm, "forest", seed, lambda arm=arm, seed=seed: grow(arm, seed), years=years)
                for seed in session.seeds
            ]
            for arm in HEIGHTS
        }
        clear = difference(arms["oak"], arms["birch"], "height").clear
        plot = Plot("Growth", "year", "m", [mean_curve(arm, cells, "growth") for arm, cells in arms.items()])
        return Findings(
            verdict="It appeared." if clear else "Not told apart.",
            method=f"{years} years.",
            tables=[mean_table("Heights", arms, [Column("height, m", "height", 1)])],
            plots=[plot],
        )

    return Study(name="made-up", title="Trees", source="Nobody 2020", claim="Oaks are higher.", run=run)
