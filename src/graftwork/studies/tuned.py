"""Cells that are runs of `tune`: a recipe for each arm, seed and rate; the rate chosen alike for every arm."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from graftwork.studies.cells import Cell, Line, Measured
from graftwork.studies.findings import Table
from graftwork.studies.rates import Searched, best_rate, try_rates
from graftwork.studies.session import Session
from graftwork.training.recipe import Recipe
from graftwork.training.run import tune

Values = dict[str, Any]


@dataclass(frozen=True)
class Bed:
    """A task that arms are tuned on.

    Attributes:
        name: of the task.
        recipe: plain values of the recipe of (arm, rate, seed), without its output.
        rates: what an arm's rate is chosen from.
        score: of a finished run, by its folder and its scores on the test part; higher is better. The accuracy by
            default.
        chosen_by: the score of the validation part that decides the rate, the validation loss decides among equals;
            None leaves it to the loss alone.
    """

    name: str
    recipe: Callable[[str, float, int], Values]
    rates: Callable[[str], Sequence[float]]
    score: Callable[[Path, Mapping[str, float]], float] = lambda folder, test: test["accuracy"]
    chosen_by: str | None = "accuracy"


def cell(session: Session, bed: Bed, arm: str, seed: int, rate: float) -> Cell:
    """The figures of one run: `score`, `test loss`, `choice score`, `choice loss`, `trained` values; curve `loss`."""
    recipe = bed.recipe(arm, rate, seed)
    technique, data, training = recipe["technique"], recipe["data"], recipe["training"]
    first = technique[0] if isinstance(technique, list) else technique
    return session.cell(
        arm,
        bed.name,
        seed,
        partial(measure, bed, recipe),
        rate=rate,
        rank=first.get("rank"),
        rows=data.get("limit"),
        epochs=training["epochs"],
        batch=training["batch_size"],
    )


def search(session: Session, bed: Bed, arms: Iterable[str]) -> dict[str, dict[float, Cell]]:
    """Each arm at each of its rates, with the first seed."""
    return try_rates(partial(cell, session, bed), {arm: bed.rates(arm) for arm in arms}, session.seeds[0])


def rates_table(bed: Bed, searched: Searched, seed: int) -> Table:
    """What each rate came to on the validation part, `*` at the chosen one."""
    figure, factor = ("choice loss", 1.0) if bed.chosen_by is None else ("choice score", 100.0)
    rows = [
        [
            arm,
            *(
                f"{rate:g}: {found.figures[figure] * factor:.2f}{'*' * (rate == best_rate(by_rate))}"
                for rate, found in by_rate.items()
            ),
        ]
        for arm, by_rate in searched.items()
    ]
    what = "loss" if bed.chosen_by is None else f"{bed.chosen_by}, %"
    width = max(len(row) for row in rows) - 1
    headings = ["", *("rate: " + what if number == 0 else "" for number in range(width))]
    title = f"Choosing the rate on {bed.name}: validation {what}, seed {seed}"
    return Table(title, headings, [[*row, *[""] * (width + 1 - len(row))] for row in rows])


def measure(bed: Bed, recipe: Values) -> Measured:
    """Tune by the recipe; scores of the last state, and the task's part of the training loss along the way."""
    with tempfile.TemporaryDirectory(prefix="graftwork-study-") as place:
        folder = Path(place) / "run"
        result = tune(Recipe.of({**recipe, "output": str(folder)}))
        validation, test = result.scores["validation"], result.scores["test"]
        figures = {
            "score": bed.score(folder, test),
            "test loss": test["loss"],
            "choice score": 0.0 if bed.chosen_by is None else validation[bed.chosen_by],
            "choice loss": validation["loss"],
            "trained": result.trainable,
        }
        return Measured(figures, {"loss": _losses(folder / "metrics.jsonl")})


def _losses(file: Path) -> Line:
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        (record["step"], record.get("loss_task", record["loss"])) for record in records if "loss" in record
    ]
