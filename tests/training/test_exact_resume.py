"""Runs whose adapter file drops what writes it: a checkpoint keeps all of it, and goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from interrupted import adapter_bytes, numbers, tune_until
from tiny_runs import recipe_values

from graftwork.training import checkpoints
from graftwork.training.recipe import Recipe
from graftwork.training.run import tune

WRITTEN_BY = {
    "prefix": ({"name": "prefix-tuning", "length": 3, "hidden": 8}, "shared.embedding"),
    "p-tuning": ({"name": "p-tuning", "length": 3, "hidden": 8, "encoder": "lstm"}, "lstm.weight_hh_l0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRITTEN_BY)
def test_a_stopped_run_goes_on_exactly_with_what_writes_its_keys_or_prompts(
    case: str, stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    technique, inner = WRITTEN_BY[case]
    values = {**recipe_values(stage, tmp_path / "whole", steps=6), "technique": technique}
    stopped = {**values, "output": str(tmp_path / "stopped")}
    tune(Recipe.of(values))
    tune_until(4, stopped, monkeypatch)
    kept = checkpoints.read(tmp_path / "stopped" / "checkpoint-4").tensors
    assert any(name.startswith("trained/") and name.endswith(inner) for name in kept)
    assert tune(Recipe.of(stopped)).steps == 6
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "whole")
    assert inner.encode() not in adapter_bytes(tmp_path / "whole")
