"""The table of runs against hand-made results."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from statistics import stdev

import pytest
from tiny_runs import recipe_values

from graftwork.cli.main import main
from graftwork.errors import StateError
from graftwork.training.recipe import Recipe
from graftwork.training.result import RunResult
from graftwork.training.summary import HEAD, read_runs, table

FACTS = RunResult(
    output="", model="m", task="text-classification", techniques=("LoRA(rank=2)", HEAD), labels=("a", "b"),
    examples={"train": 8}, scores={}, best_metric="accuracy", steps=4, kept_step=4, stopped_early=False,
    trainable=50, parameters=2000, file_bytes=1500, flops_per_step=1, seconds=3.0, seconds_per_step=0.1,
    peak_bytes=1, peak_of="process", processes=1, seed=0, command="", versions={},
)  # fmt: skip


def put(stage: Path, folder: Path, accuracy: float, **training: object) -> str:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(Recipe.of(recipe_values(stage, folder, **training)).text())
    scores = {"validation": {"accuracy": accuracy}, "test": {"accuracy": accuracy - 0.1}}
    (folder / "run.json").write_text(json.dumps({**asdict(FACTS), "scores": scores}))
    return str(folder)


def test_seeds_are_one_row_and_other_recipes_another(stage: Path, tmp_path: Path, capsys) -> None:
    accuracies = [0.8, 0.9, 0.85]
    folders = [put(stage, tmp_path / f"a{n}", a, seed=n) for n, a in enumerate(accuracies)]
    folders.append(put(stage, tmp_path / "b", 0.7, learning_rate=0.5))
    names, rows = table(read_runs(folders))
    first, second = (dict(zip(names, row, strict=True)) for row in rows)
    assert first["technique"] == "LoRA(rank=2)"
    assert (first["seeds"], second["seeds"]) == ("3", "1")
    assert first["validation"] == f"0.8500 ± {stdev(accuracies):.4f}"
    assert (second["validation"], second["test"], second["learning rate"]) == ("0.7000", "0.6000", "0.5")
    assert (first["share"], first["file"]) == ("2.500%", "1.5 kB")
    with pytest.raises(SystemExit, match="0"):
        main(["runs", *folders])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    assert printed[2].startswith("| LoRA(rank=2) | 0.005 | 3 |")


def test_a_seed_that_was_run_again_counts_once_and_its_newest_run(stage: Path, tmp_path: Path) -> None:
    folders = [put(stage, tmp_path / f"{n}", a, seed=n % 2) for n, a in enumerate([0.9, 0.6, 0.8, 0.7])]
    for age, folder in enumerate(reversed(folders)):  # the first is the newest
        os.utime(Path(folder) / "run.json", (1000 + age, 1000 + age))
    names, [row] = table(read_runs([*folders, f"{folders[0]}/"]))
    cells = dict(zip(names, row, strict=True))
    assert cells["seeds"] == "2 (2 older left out)"
    assert cells["validation"] == f"0.7500 ± {stdev([0.9, 0.6]):.4f}"


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no finished run"):
        read_runs([tmp_path])
