"""A run folder, and the three states it can be in: absent, interrupted, finished.

recipe.yaml     resolved: running it again is this run again
metrics.jsonl   step, loss, lr, evaluation, seconds
checkpoint-N/   while running: the newest and the best
adapter/        the result; a file for each context, where there are several
connector.safetensors           of a model made of two bases: what joins them
curves.png, card.md, run.json   written last; run.json marks the run as finished
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.adapters.store import IN_RUN
from graftwork.errors import BadFile, StateError
from graftwork.training import checkpoints, yaml
from graftwork.training.journal import write_text
from graftwork.training.recipe import Recipe


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        return self.path / IN_RUN

    @property
    def connector(self) -> Path:
        return self.path / "connector.safetensors"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def card(self) -> Path:
        return self.path / "card.md"

    @property
    def result(self) -> Path:
        return self.path / "run.json"

    @property
    def finished(self) -> bool:
        return self.result.exists()

    def facts(self) -> dict[str, Any]:
        """What run.json says."""
        try:
            return json.loads(self.result.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadFile(f"{self.result} cannot be read: {error}") from None

    def write(self, file: Path, text: str) -> None:
        """Write a file whole or not at all."""
        write_text(file, text)


def open_run(recipe: Recipe, *, overwrite: bool) -> Path | None:
    """Make the folder ready for `recipe`; returns the checkpoint to go on from, if any.

    Raises StateError, and deletes nothing, when the folder holds a finished run, another run, or other files.
    """
    folder = RunFolder(Path(recipe.output))
    if folder.path.exists() and any(folder.path.iterdir()):
        if not folder.recipe.exists():
            raise StateError(
                f"{folder.path} holds files that are no run of ours; choose another output folder"
            )
        if overwrite:
            _discard(folder.path)
        else:
            _refuse_other(folder, recipe)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write(folder.recipe, recipe.text())
    checkpoints.sweep(folder.path)
    return checkpoints.latest(folder.path)


def _discard(path: Path) -> None:
    """Delete a run; killed halfway, it is out of the way all the same."""
    leaving = path.with_name(path.name + ".leaving")
    shutil.rmtree(leaving, ignore_errors=True)
    path.rename(leaving)
    shutil.rmtree(leaving)


def _refuse_other(folder: RunFolder, recipe: Recipe) -> None:
    if folder.finished:
        raise StateError(f"{folder.path} holds a finished run; choose another output, or pass --overwrite")
    changed = _differences(yaml.read(folder.recipe), recipe.resolved())
    if changed:
        raise StateError(
            f"{folder.path} holds an interrupted run of another recipe; they differ in {', '.join(changed)}. "
            "Choose another output, or pass --overwrite"
        )


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [d for k in keys for d in _differences(one.get(k), other.get(k), f"{path}.{k}".lstrip("."))]
    return [] if one == other else [path]
