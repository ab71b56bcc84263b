"""LoRA beside full fine-tuning of MiniLM on SST-2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from graftwork.errors import BadData
from graftwork.studies.cells import Cell
from graftwork.studies.findings import Column, Findings, Plot, Table, mean_curve, mean_table
from graftwork.studies.rates import best_rates
from graftwork.studies.session import Session
from graftwork.studies.spread import over_seeds
from graftwork.studies.study import Study
from graftwork.studies.tuned import Bed, Values, cell, rates_table, search

LORA, FULL = "LoRA", "full fine-tuning"
TECHNIQUES = {
    LORA: {"name": "lora", "rank": 4, "workspaces": ["all-linear"]},
    FULL: {"name": "fine-tuning"},
}
RATES = {LORA: (1.5e-3, 5e-3, 1.5e-2), FULL: (5e-5, 1.5e-4, 5e-4)}
GOAL, SHARE = 0.98, 0.02


def run(session: Session) -> Findings:
    folder = session.data("sst2")
    if folder is None:
        raise BadData(
            "the study sst2 needs the folder sst2 with train.jsonl and test.jsonl: give it by --data"
        )
    rows, epochs = session.pick(small=(3000, 2), full=(15_000, 3))
    bed = Bed("SST-2", partial(_recipe, folder, rows, epochs), lambda arm: RATES[arm])
    searched = search(session, bed, TECHNIQUES)
    best = best_rates(searched)
    cells = {arm: [cell(session, bed, arm, seed, best[arm]) for seed in session.seeds] for arm in TECHNIQUES}
    return Findings(
        verdict=verdict(cells),
        method=(
            f"MiniLM (22.7 M values): {rows:,} training rows drawn by the seed from nine tenths of the training file, "
            f"600 for validation from the other tenth; {epochs} epochs, batches of 32, at most 64 tokens. Scores "
            f"are on the test file. The rate is the best of three for each by the validation part, "
            f"seed {session.seeds[0]}."
        ),
        tables=[_results(cells, best), rates_table(bed, searched, session.seeds[0])],
        plots=[
            Plot("SST-2", "step", "training loss", [mean_curve(arm, cells[arm], "loss") for arm in cells])
        ],
    )


def _recipe(folder: Path, rows: int, epochs: int, arm: str, rate: float, seed: int) -> Values:
    return {
        "model": "minilm",
        "technique": TECHNIQUES[arm],
        "task": {"name": "text-classification", "max_length": 64},
        "data": {
            "train": str(folder / "train.jsonl"),
            "test": str(folder / "test.jsonl"),
            "hold_out": 0.1,
            "limit": rows,
            "evaluation_limit": 600,
        },
        "training": {
            "epochs": epochs,
            "batch_size": 32,
            "learning_rate": rate,
            "order": "length",
            "seed": seed,
        },
    }


def verdict(cells: Mapping[str, Sequence[Cell]]) -> str:
    """Whether LoRA reaches the share of full fine-tuning's accuracy, with how many of its values."""
    low, full = (over_seeds(cells[arm], "score") for arm in (LORA, FULL))
    reached, values = low.mean / full.mean, _trained(cells[LORA]) / _trained(cells[FULL])
    appeared = "Yes" if reached >= GOAL and values < SHARE else "No"
    return (
        f"{appeared}: LoRA reaches {reached:.1%} of full fine-tuning's accuracy ({low.text(4)} against "
        f"{full.text(4)}) with {values:.2%} of its trained values."
    )


def _trained(cells: Sequence[Cell]) -> float:
    return cells[0].figures["trained"]


def _results(cells: Mapping[str, Sequence[Cell]], best: Mapping[str, float]) -> Table:
    means = mean_table(
        "After tuning", cells, [Column("test accuracy", "score", 4), Column("test loss", "test loss", 3)]
    )
    rows = [
        [row[0], f"{best[row[0]]:g}", *row[1:], f"{round(_trained(cells[row[0]])):,}"] for row in means.rows
    ]
    return Table(means.title, ["", "rate", *means.headings[1:], "trained"], rows)


STUDY = Study(
    name="sst2",
    title="MiniLM on SST-2: LoRA beside full fine-tuning",
    source="Hu et al. 2021, arXiv:2106.09685 (LoRA)",
    claim="LoRA with under 2 % of the trainable values reaches at least 98 % of the accuracy of full fine-tuning.",
    run=run,
)
