"""What people read: sizes, the card, the comparison of runs, progress on the terminal."""

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from graftwork.cli.comparison import Comparison
from graftwork.cli.progress import scores_text
from graftwork.errors import BadFile
from graftwork.training.curves import draw
from graftwork.training.report import write_report
from graftwork.training.result import RunResult, card, size

RESULT = RunResult(
    output="runs/a",
    model="minilm",
    task="text-classification",
    techniques=("LoRA(rank=4)", "FineTuning(workspaces=['head'])"),
    labels=("x", "y"),
    examples={"train": 1000, "validation": 100, "test": 50},
    scores={"validation": {"loss": 0.5, "accuracy": 0.8}, "test": {"loss": 0.6, "accuracy": 0.75}},
    best_metric="accuracy",
    steps=120,
    kept_step=90,
    stopped_early=True,
    trainable=50_000,
    parameters=20_000_000,
    file_bytes=201_000,
    flops_per_step=23_000_000_000,
    seconds=61.5,
    seconds_per_step=0.25,
    peak_bytes=900_000_000,
    peak_of="process",
    processes=1,
    seed=3,
    command="graftwork tune r.yaml",
    versions={"torch": "2.13.0"},
)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_340_000, "2.34 MB"), (7.1e11, "710 GB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_the_card_says_what_it_takes_to_repeat_the_run() -> None:
    text = card(RESULT)
    for part in (
        "LoRA(rank=4)",
        "50,000 (0.250% of 20,000,000)",
        "201 kB",
        "23.00 G",
        "stopped early",
        "Seed 3",
    ):
        assert part in text
    assert "graftwork tune r.yaml" in text
    assert "| accuracy | 0.8000 | 0.7500 |" in text


def test_results_read_back_and_foreign_files_are_refused() -> None:
    import json

    facts = json.loads(RESULT.text())
    assert RunResult.of(facts, "run.json") == RESULT
    del facts["seed"]
    with pytest.raises(BadFile, match="seed"):
        RunResult.of(facts, "run.json")


def test_the_report_compares_runs(tmp_path: Path) -> None:
    other = replace(RESULT, output=str(tmp_path / "none"), trainable=2_000, techniques=("IA3()",))
    page = write_report({"LoRA": RESULT, "(IA)3": other}, tmp_path, "Two ways").read_text()
    assert page.startswith("# Two ways")
    assert "| LoRA | 50,000 | 0.25% | 201 kB | 0.750 | 0.600 | 0.250 | 23.0 | 900 MB |" in page
    assert "scores on the test split" in page
    assert imread(tmp_path / "report.png").std() > 0.01


def test_curves_of_any_run_can_be_drawn(tmp_path: Path) -> None:
    records = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval_loss": 1.5, "eval_f1": 0.4},
    ]
    for number, some in enumerate([[], records[:1], records]):
        draw(some, "f1", 2, tmp_path / f"{number}.png")
        assert imread(tmp_path / f"{number}.png").std() > 0.01


def test_progress_line() -> None:
    record = {
        "step": 3,
        "loss": 0.41234,
        "eval_loss": 1.0,
        "eval_accuracy": 0.5,
        "eval_macro_f1": 0.25,
        "eval_x": 9,
    }
    assert scores_text(record) == "loss 0.4123  accuracy 0.5  macro_f1 0.25"


def test_the_live_table_fills_as_runs_go_on(tmp_path: Path) -> None:
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    with Comparison(["LoRA", "(IA)3"], console) as table:
        table.watch("LoRA")({"step": 5, "loss": 1.25}, 120)
        table.watch("LoRA")({"step": 5, "eval_accuracy": 0.5}, 120)
        console.print(table._table())
        table.done("LoRA", RESULT)
    text = console.export_text()
    assert "5/120" in text
    assert "1.250" in text
    assert "0.750" in text
    assert "0.25%" in text
