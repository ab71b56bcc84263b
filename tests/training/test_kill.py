"""SIGKILL at random moments, also in writing checkpoints: the bits are those of a run left in peace."""

import multiprocessing
import random
import time
from pathlib import Path

import pytest
from interrupted import numbers
from tiny_runs import recipe_values

from graftwork.training import checkpoints
from graftwork.training.recipe import Recipe

SPAWNER = multiprocessing.get_context("forkserver")


def work(values: dict[str, object]) -> None:
    import torch

    torch.set_num_threads(1)
    from graftwork.training.run import tune

    tune(Recipe.of(values))


def started(values: dict[str, object]) -> multiprocessing.process.BaseProcess:
    process = SPAWNER.Process(target=work, args=(values,), daemon=True)
    process.start()
    return process


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_bits(stage: Path, tmp_path: Path) -> None:
    SPAWNER.set_forkserver_preload(["graftwork.training.run"])
    length = {"epochs": 5, "log_every": 1, "evaluate_every": 6, "save_every": 2}
    peaceful, killed = tmp_path / "peaceful", tmp_path / "killed"
    process = started(recipe_values(stage, peaceful, **length))
    process.join()
    assert process.exitcode == 0
    draw, kills, moments = random.Random(0), 0, set()
    while not (killed / "run.json").exists():
        process = started(recipe_values(stage, killed, **length))
        _wait_for_progress(process, killed, draw.randrange(3, 14))
        time.sleep(draw.uniform(0, 0.05))
        if process.is_alive():
            process.kill()
            kills += 1
            moments.add(_seen(killed))
        process.join()
        assert process.exitcode in (0, -9)
    assert kills >= 3
    assert len(moments) >= 2
    assert numbers(killed) == numbers(peaceful)
    one, other = ((run / "adapter" / "default.safetensors").read_bytes() for run in (peaceful, killed))
    assert one == other
    assert {file.name for file in killed.iterdir()} == {file.name for file in peaceful.iterdir()}


def _wait_for_progress(process: multiprocessing.process.BaseProcess, output: Path, lines: int) -> None:
    """Until the run has logged so many more lines, or has ended."""
    start = _lines(output)
    while process.is_alive() and _lines(output) < start + lines:
        time.sleep(0.002)


def _lines(output: Path) -> int:
    file = output / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _seen(output: Path) -> str:
    newest = checkpoints.latest(output)
    return newest.name if newest else ""


@pytest.mark.slow
def test_killed_after_the_last_step_only_the_rest_is_done(stage: Path, tmp_path: Path, monkeypatch) -> None:
    """The last checkpoint stands, run.json does not: no step is taken twice and nothing is lost."""
    from graftwork.training import run

    values = recipe_values(stage, tmp_path / "run", steps=6)
    whole = run.tune(Recipe.of({**values, "output": str(tmp_path / "whole")}))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "draw", die)
        with pytest.raises(KeyboardInterrupt):
            run.tune(Recipe.of(values))
    result = run.tune(Recipe.of(values))
    assert result.steps == whole.steps == 6
    assert result.scores == whole.scores
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


@pytest.mark.slow
def test_killed_after_patience_ran_out_it_does_not_train_on(stage: Path, tmp_path: Path, monkeypatch) -> None:
    from graftwork.training import run

    values = recipe_values(
        stage, tmp_path / "run", learning_rate=1e-12, epochs=9, evaluate_every=1, patience=2
    )

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "draw", die)
        with pytest.raises(KeyboardInterrupt):
            run.tune(Recipe.of(values))
    result = run.tune(Recipe.of(values))
    assert (result.steps, result.kept_step, result.stopped_early) == (3, 1, True)
