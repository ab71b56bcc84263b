"""Runs whose adapter file drops what writes it: a checkpoint keeps all of it, and goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import recipe_values

from graftwork.training import checkpoints
from graftwork.training.journal import Journal
from graftwork.training.recipe import Recipe
from graftwork.training.run import tune

WRITTEN_BY = {
    "prefix": ({"name": "prefix-tuning", "length": 3, "hidden": 8}, "shared.embedding"),
    "p-tuning": ({"name": "p-tuning", "length": 3, "hidden": 8, "encoder": "lstm"}, "lstm.weight_hh_l0"),
}


def numbers(output: Path) -> list[dict[str, float]]:
    records = Journal(output / "metrics.jsonl").records()
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("case", WRITTEN_BY)
def test_a_stopped_run_goes_on_exactly_with_what_writes_its_keys_or_prompts(
    case: str, stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    technique, inner = WRITTEN_BY[case]
    values = {**recipe_values(stage, tmp_path / "whole", steps=6), "technique": technique}
    stopped = {**values, "output": str(tmp_path / "stopped")}
    tune(Recipe.of(values))
    write = checkpoints.write

    def stopping(run: Path, step: int, *rest: Any) -> Path:
        folder = write(run, step, *rest)
        if step == 4:
            raise KeyboardInterrupt
        return folder

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            tune(Recipe.of(stopped))
    kept = checkpoints.read(tmp_path / "stopped" / "checkpoint-4").tensors
    assert any(name.startswith("trained/") and name.endswith(inner) for name in kept)
    assert tune(Recipe.of(stopped)).steps == 6
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    files = [tmp_path / run / "adapter" / "default.safetensors" for run in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert inner.encode() not in files[0].read_bytes()
