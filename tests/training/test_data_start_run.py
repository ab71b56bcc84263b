"""Runs whose techniques start from data take it from their training samples, the same at every start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import adapter_bytes, tune_until
from tiny_runs import recipe_values

import graftwork as gw
from graftwork.adapters.format import read_card
from graftwork.errors import BadRecipe
from graftwork.training import grafting
from graftwork.training.calibration import calibration
from graftwork.training.materials import prepare
from graftwork.training.recipe import Recipe
from graftwork.training.run import tune

STARTS = [
    {"name": "lora", "rank": 2, "init": "eva"},
    {"name": "lora", "rank": 2, "init": "lora-ga"},
    {"name": "s2ft", "share": 0.1, "selection": "activation"},
]


def values(stage: Path, output: Path, technique: dict[str, Any], **training: object) -> dict[str, Any]:
    return {**recipe_values(stage, output, steps=3, **training), "technique": technique}


def test_batches_are_training_samples_drawn_by_the_seed(stage: Path, tmp_path: Path) -> None:
    recipe = Recipe.of(values(stage, tmp_path, STARTS[0], calibration_batches=2, seed=3))
    materials = prepare(recipe)
    assert calibration(materials, [gw.LoRA()], recipe.training) is None
    batches = calibration(materials, recipe.techniques(), recipe.training)
    assert batches is not None
    found, again = list(batches), list(batches)
    assert [len(batch["labels"]) for batch in found] == [8, 8]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, again, strict=True))
    assert {"input_ids", "attention_mask", "labels"} <= set(found[0])


@pytest.mark.slow
@pytest.mark.parametrize("technique", STARTS, ids=str)
def test_an_interrupted_run_goes_on_as_the_whole_one(
    technique: dict[str, Any], stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    attach = grafting.attach
    monkeypatch.setattr(grafting, "attach", lambda *a, **k: (seen.append(attach(*a, **k)), seen[-1])[1])
    tune(Recipe.of(values(stage, tmp_path / "whole", technique)))
    first = tmp_path / "stopped"
    tune_until(2, values(stage, first, technique), monkeypatch)
    tune(Recipe.of(values(stage, first, technique)))
    assert adapter_bytes(first) == adapter_bytes(tmp_path / "whole")
    stored = read_card(first / "adapter" / "default.safetensors").techniques[0]
    assert not stored.needs_data, "a file brings what was found in the data"
    assert seen[0].techniques[0].needs_data


def test_calibration_batches_below_one(stage: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="calibration_batches"):
        Recipe.of(values(stage, tmp_path, STARTS[0], calibration_batches=0))
