"""Runs that are stopped on the way, and what shows that they went on as if they had not been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graftwork.training import checkpoints
from graftwork.training.journal import Journal
from graftwork.training.recipe import Recipe
from graftwork.training.run import tune


def numbers(output: Path) -> list[dict[str, float]]:
    """What a run wrote of itself, but for the time it took."""
    records = Journal(output / "metrics.jsonl").records()
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def tune_until(step: int, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped when its checkpoint of that step has been written."""
    write = checkpoints.write

    def stopping(run: Path, written: int, *rest: Any) -> Path:
        folder = write(run, written, *rest)
        if written == step:
            raise KeyboardInterrupt
        return folder

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            tune(Recipe.of(values))


def adapter_bytes(output: Path) -> bytes:
    """The adapter file that a run ended with."""
    return (output / "adapter" / "default.safetensors").read_bytes()
