"""Objectives on two processes (gloo, CPU) against one: the same steps, the same parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_distributed import launch, quiet, values

from graftwork.training.journal import Journal
from graftwork.training.recipe import Recipe
from graftwork.training.run import tune

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
__all__ = ["quiet"]
CONSISTENT = {"name": "consistency", "weight": 0.3, "temperature": 2}
ORTHOGONAL = {"name": "orthogonality", "weight": 0.01}


def records(output: Path) -> list[dict[str, float]]:
    found = [r for r in Journal(output / "metrics.jsonl").records() if "loss" in r]
    return [{k: v for k, v in r.items() if k.startswith("loss")} for r in found]


@pytest.mark.parametrize(
    ("sharding", "objectives"),
    [("none", [CONSISTENT, ORTHOGONAL]), ("fsdp2", [CONSISTENT])],
    ids=["ddp", "fsdp2"],
)
def test_two_processes_train_as_one(
    quiet: Path, tmp_path: Path, sharding: str, objectives: list[dict[str, Any]]
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    tune(Recipe.of({**values(quiet, alone), "objectives": objectives}))
    launch(Recipe.of({**values(quiet, together, sharding=sharding), "objectives": objectives}), tmp_path)
    for one, two in zip(records(alone), records(together), strict=True):
        assert two == pytest.approx(one, abs=3e-5, rel=1e-4)
