"""Two processes (gloo, CPU) against one: DDP and FSDP2 take the same steps and write the same adapter."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import recipe_values

from graftwork.testing import tiny
from graftwork.training.evaluate import evaluate
from graftwork.training.journal import Journal
from graftwork.training.recipe import Recipe
from graftwork.training.result import RunResult
from graftwork.training.run import tune

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
COMMAND = "torchrun --standalone --nproc-per-node 2 -m graftwork tune"
UNEVEN = 21  # rows of validation: of the second round of eight each, one process has five and the other none
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LENGTH = {"steps": 6, "log_every": 1, "evaluate_every": 3, "save_every": 2, "keep": "last"}


@pytest.fixture(scope="module")
def quiet(stage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage with a host without dropout: processes draw different masks."""

    folder = tmp_path_factory.mktemp("quiet") / "stage"
    shutil.copytree(stage, folder)
    tiny("bert-base", NO_DROPOUT).save_pretrained(folder / "host")
    return folder


@pytest.fixture(scope="module")
def alone(quiet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    tune(Recipe.of(values(quiet, output)))
    return output


def values(quiet: Path, output: Path, **training: object) -> dict[str, object]:
    made = recipe_values(quiet, output, **LENGTH, **training)
    data = {**made["data"], "evaluation_limit": UNEVEN}
    return {**made, "data": data, "technique": {"name": "lora", "up_rate": 4.0}}


def launch(recipe: Recipe, folder: Path) -> None:
    file = folder / "recipe.yaml"
    file.write_text(recipe.text())
    there = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*COMMAND.split(), str(file)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PATH": there},
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_page_gives_the_command_of_these_tests() -> None:
    page = Path(__file__).parents[2] / "docs" / "training.md"
    assert f"\n{COMMAND} recipe.yaml " in page.read_text(encoding="utf-8")


def losses(output: Path) -> list[float]:
    return [r["loss"] for r in Journal(output / "metrics.jsonl").records() if "loss" in r]


@pytest.mark.parametrize(("sharding", "slices"), [("none", 2), ("fsdp2", 1)], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one(
    quiet: Path, alone: Path, tmp_path: Path, sharding: str, slices: int
) -> None:
    output = tmp_path / "run"
    launch(Recipe.of(values(quiet, output, sharding=sharding, accumulation=slices)), tmp_path)
    assert len(list((output / "adapter").iterdir())) == 1
    assert losses(output) == pytest.approx(losses(alone), abs=2e-5)
    assert len(losses(output)) == 6
    result = RunResult.of(json.loads((output / "run.json").read_text()), "run.json")
    assert result.processes == 2
    assert evaluate(output)["loss"] == pytest.approx(result.scores["validation"]["loss"], abs=1e-5)
    one, two = (load_file(run / "adapter" / "default.safetensors") for run in (alone, output))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)


def test_two_processes_project_gradients_alike(quiet: Path, tmp_path: Path) -> None:
    optimizer = {"name": "natural-galore", "rank": 2, "refresh_interval": 2, "history": 3, "damping": 0.1}
    whole = {"technique": {"name": "fine-tuning", "workspaces": ["attention.*", "feedforward.*"]}}
    alone, together = tmp_path / "alone", tmp_path / "together"
    tune(Recipe.of({**values(quiet, alone, optimizer=optimizer), **whole}))
    launch(Recipe.of({**values(quiet, together, optimizer=optimizer), **whole}), tmp_path)
    assert losses(together) == pytest.approx(losses(alone), abs=2e-5)
    one, two = (load_file(run / "adapter" / "default.safetensors") for run in (alone, together))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)
