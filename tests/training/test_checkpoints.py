"""A checkpoint is whole or absent, whatever is left lying about; the journal and the folder likewise."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from graftwork.errors import BadFile, StateError
from graftwork.training import checkpoints, states
from graftwork.training.folder import RunFolder, open_run
from graftwork.training.journal import Journal
from graftwork.training.recipe import Recipe

CONTENTS = checkpoints.Contents({"trained/a": torch.arange(3.0)}, {"n": 1})


def put(run: Path, step: int) -> Path:
    return checkpoints.write(run, step, CONTENTS, lambda file: file.write_text("{}"))


def test_write_and_read(tmp_path: Path) -> None:
    folder = put(tmp_path, 7)
    found = checkpoints.read(folder)
    assert torch.equal(found.tensors["trained/a"], torch.arange(3.0))
    assert found.values == {"n": 1}
    assert checkpoints.step_of(folder) == 7


def test_the_newest_is_by_number_not_by_spelling(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        put(tmp_path, step)
    assert [checkpoints.step_of(f) for f in checkpoints.whole(tmp_path)] == [9, 10, 100]
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("files", [0, 1, 2, 3])
def test_a_kill_while_writing_leaves_nothing_that_counts(tmp_path: Path, monkeypatch, files: int) -> None:
    """Every number of flushed files at which the process could die."""
    put(tmp_path, 1)
    flushed = []

    def dying(file: Path) -> None:
        if len(flushed) == files:
            raise KeyboardInterrupt
        flushed.append(file)

    monkeypatch.setattr(checkpoints, "_flush", dying)
    if files < 3:
        with pytest.raises(KeyboardInterrupt):
            put(tmp_path, 2)
        assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-1"
    else:
        put(tmp_path, 2)
        assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-2"
    checkpoints.sweep(tmp_path)
    assert all(folder.name in {"checkpoint-1", "checkpoint-2"} for folder in tmp_path.iterdir())


def test_a_kill_while_removing_leaves_nothing_that_counts(tmp_path: Path, monkeypatch) -> None:
    old = put(tmp_path, 1)
    put(tmp_path, 2)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *a, **k: None)
    checkpoints.remove([old])
    assert checkpoints.whole(tmp_path) == [tmp_path / "checkpoint-2"]
    monkeypatch.undo()
    checkpoints.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint-2"]


def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    folder = put(tmp_path, 3)
    file = folder / checkpoints.TENSORS
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(BadFile, match="Remove that folder"):
        checkpoints.read(folder)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_optimiser_state_round_trip(kind: type[torch.optim.Optimizer]) -> None:
    """Steps after a round trip equal steps without one, bit for bit."""

    def made() -> tuple[nn.Module, torch.optim.Optimizer, dict[int, str]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        optimizer = kind(
            [{"params": [p], "lr": 1e-3 * (1 + i)} for i, p in enumerate(model.parameters())],
            lr=1.0,
            **options,
        )
        return model, optimizer, {id(p): n for n, p in model.named_parameters()}

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        optimizer.zero_grad()
        model(torch.full((2, 3), float(number))).square().sum().backward()
        optimizer.step()

    model, optimizer, names = made()
    for number in range(3):
        step(model, optimizer, number)
    optimizer.param_groups[1]["lr"] = 0.005
    tensors, values = states.optimizer_state(optimizer, names)
    values = json.loads(json.dumps(values))
    other, resumed, other_names = made()
    states.restore_trained(other, {n: states.whole(p) for n, p in states.trained(model).items()}, "t")
    states.restore_optimizer(resumed, other_names, tensors, values)
    for number in range(3, 6):
        step(model, optimizer, number)
        step(other, resumed, number)
    for one, two in zip(model.parameters(), other.parameters()):
        assert torch.equal(one, two)


def test_random_state_round_trip_through_json() -> None:
    state = states.random_state()
    plain = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
    bits = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    first = random.random(), np.random.rand(), np.random.randn(), torch.rand(2).tolist(), random.gauss(0, 1)
    states.restore_random({**json.loads(json.dumps(plain)), **bits})
    again = random.random(), np.random.rand(), np.random.randn(), torch.rand(2).tolist(), random.gauss(0, 1)
    assert first == again


def test_tensors_of_another_model_are_refused_and_nothing_changes() -> None:
    model = nn.Linear(2, 2)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(BadFile, match="bias, extra"):
        states.restore_trained(model, {"weight": torch.ones(2, 2), "extra": torch.ones(1)}, "here")
    with pytest.raises(BadFile, match="weight"):
        states.restore_trained(model, {"weight": torch.ones(3, 2), "bias": torch.ones(2)}, "here")
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_the_journal_passes_over_a_half_line_and_forgets_what_came_later(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        journal.add({"step": step, "loss": 1.0 / step, "seconds": step * 10.0})
    with journal.path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in journal.records()] == [1, 2, 3]
    assert journal.cut(2) == 20.0
    journal.add({"step": 3, "loss": 0.3, "seconds": 25.0})
    assert [record["step"] for record in journal.records()] == [1, 2, 3]
    assert Journal(tmp_path / "absent.jsonl", writes=False).cut(5) == 0.0


def recipe(output: Path, seed: int = 0) -> Recipe:
    return Recipe.of(
        {
            "model": "minilm",
            "technique": "lora",
            "task": "text-classification",
            "data": {"train": "docstrings:subjects"},
            "training": {"seed": seed},
            "output": str(output),
        }
    )


def test_run_folders(tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert open_run(recipe(output), overwrite=False) is None
    assert Recipe.load(output / "recipe.yaml") == recipe(output)
    put(output, 4)
    assert open_run(recipe(output), overwrite=False) == output / "checkpoint-4"
    with pytest.raises(StateError, match=r"differ in training\.seed"):
        open_run(recipe(output, seed=1), overwrite=False)
    assert checkpoints.latest(output) == output / "checkpoint-4"
    RunFolder(output).result.write_text("{}")
    with pytest.raises(StateError, match="finished run"):
        open_run(recipe(output), overwrite=False)
    assert open_run(recipe(output, seed=1), overwrite=True) is None
    assert [file.name for file in output.iterdir()] == ["recipe.yaml"]


def test_a_folder_with_other_files_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(StateError, match="no run of ours"):
            open_run(recipe(tmp_path), overwrite=overwrite)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
