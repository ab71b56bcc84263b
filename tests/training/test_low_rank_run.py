"""Runs with a low-rank optimiser: what a recipe may say, and that an interrupted run goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import adapter_bytes, numbers, tune_until
from tiny_runs import recipe_values

from graftwork.errors import BadRecipe, NothingMatches
from graftwork.optimizers.galore import GaLore
from graftwork.optimizers.natural_galore import NaturalGaLore
from graftwork.training import checkpoints
from graftwork.training.recipe import Recipe
from graftwork.training.run import tune

NATURAL = {"name": "natural-galore", "rank": 2, "refresh_interval": 3, "history": 3, "betas": [0.8, 0.9]}


def values(stage: Path, output: Path, optimizer: object = NATURAL, **training: object) -> dict[str, Any]:
    whole = {"name": "fine-tuning", "workspaces": ["attention.*", "feedforward.*"]}
    return {**recipe_values(stage, output, optimizer=optimizer, **training), "technique": whole}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [NATURAL, {"name": "galore", "rank": 4, "svd": "randomized"}])
def test_an_interrupted_run_goes_on_exactly(
    optimizer: dict[str, object], stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(Recipe.of(values(stage, tmp_path / "whole", optimizer, steps=6)))
    stopped = values(stage, tmp_path / "stopped", optimizer, steps=6)
    tune_until(4, stopped, monkeypatch)
    kept = checkpoints.read(tmp_path / "stopped" / "checkpoint-4").tensors
    assert any(name.endswith("|projector") for name in kept)
    assert any(name.endswith("|history") for name in kept) == (optimizer["name"] == "natural-galore")
    assert tune(Recipe.of(stopped)).steps == 6
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "whole")


def test_an_adapter_too_thin_to_project_is_refused(stage: Path, tmp_path: Path) -> None:
    with pytest.raises(NothingMatches, match="lower the rank"):
        tune(Recipe.of({**recipe_values(stage, tmp_path / "run", optimizer=NATURAL)}))


def test_a_recipe_spells_the_optimizer(stage: Path, tmp_path: Path) -> None:
    recipe = Recipe.of(values(stage, tmp_path))
    made = recipe.training.low_rank()
    assert made is not None
    assert (made.kind, made.rank, made.options["betas"]) == (NaturalGaLore, 2, (0.8, 0.9))
    assert Recipe.of(recipe.resolved()) == recipe
    assert Recipe.of(values(stage, tmp_path, "adamw")).training.low_rank() is None
    assert Recipe.of(recipe_values(stage, tmp_path)).training.low_rank() is None


def test_groups_are_parted_and_keep_their_rate_and_decay(stage: Path, tmp_path: Path) -> None:
    made = Recipe.of(values(stage, tmp_path, {"name": "galore", "rank": 2})).training.low_rank()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    groups = [
        {"params": [model[0].weight, model[1].weight], "lr": 0.1, "weight_decay": 0.2},
        {"params": [model[0].bias, model[1].bias], "lr": 0.3, "weight_decay": 0.0},
    ]
    assert made is not None
    optimizer = made.build(model, groups)
    assert type(optimizer) is GaLore
    found = [(len(g["params"]), g.get("rank"), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(1, 2, 0.1, 0.2), (1, None, 0.1, 0.2), (2, None, 0.3, 0.0)]
    assert optimizer.param_groups[0]["params"][0] is model[0].weight


@pytest.mark.parametrize(
    "optimizer, text",
    [
        ("galor", "Did you mean galore"),
        ("galore", "galore needs a rank"),
        ({"name": "galore", "rank": 0}, "rank=0"),
        ({"name": "galore", "rank": "8"}, "rank='8'"),
        ({"name": "galore", "rank": 8, "history": 3}, "galore has no option 'history'"),
        ({"name": "galore", "rank": 8, "lr": 1.0}, "galore has no option 'lr'"),
        ({"name": "galore", "rank": 8, "scale": "much"}, "scale='much'"),
        ({"name": "galore", "rank": 8, "targets": "attn"}, "take a list"),
        ({"name": "natural-galore", "rank": 8, "clear_history": 1}, "clear_history=1"),
        ({"name": "adamw", "rank": 8}, "adamw has no option 'rank'"),
    ],
)
def test_what_a_recipe_must_not_say(optimizer: object, text: str, stage: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"training\.optimizer: .*" + text):
        Recipe.of(values(stage, tmp_path, optimizer))


def test_sharding_is_refused(stage: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="natural-galore needs whole gradients"):
        Recipe.of(values(stage, tmp_path, sharding="fsdp2"))
