"""Checkpoint folders that are whole or absent: written beside, flushed, renamed; removed by renaming first.

checkpoint-40/
  state.safetensors    trained tensors, optimiser state, random states of each process
  state.json           scheduler, groups, random states that are no tensors
  trainer_state.json   step, epoch, history
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from graftwork.adapters.disk import flush_folder
from graftwork.errors import BadFile

_WHOLE = re.compile(r"checkpoint-(\d+)")
_WRITING, _LEAVING = ".writing", ".leaving"
TENSORS, VALUES, TRAINER = "state.safetensors", "state.json", "trainer_state.json"


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds beside transformers' trainer state."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


def write(run: Path, step: int, contents: Contents, write_trainer: Callable[[Path], None]) -> Path:
    """Make `checkpoint-STEP`; a kill leaves either all of it or a leftover that is never read."""
    beside = run / f"checkpoint-{step}{_WRITING}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in contents.tensors.items()}, beside / TENSORS)
    (beside / VALUES).write_text(json.dumps(contents.values), encoding="utf-8")
    write_trainer(beside / TRAINER)
    for file in beside.iterdir():
        _flush(file)
    whole = run / f"checkpoint-{step}"
    remove([whole])
    beside.rename(whole)
    flush_folder(run)
    return whole


def read(folder: Path) -> Contents:
    """The contents of a checkpoint; raises BadFile when it is damaged."""
    try:
        values = json.loads((folder / VALUES).read_text(encoding="utf-8"))
        return Contents(load_file(folder / TENSORS), values)
    except Exception as error:
        raise BadFile(
            f"the checkpoint {folder} is damaged ({error}). Remove that folder, and the run goes on from the "
            "checkpoint before it, or from the start"
        ) from error


def whole(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [folder for folder in run.glob("checkpoint-*") if _WHOLE.fullmatch(folder.name)]
    return sorted(found, key=step_of)


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint, None when there is none."""
    return next(reversed(whole(run)), None)


def step_of(folder: Path) -> int:
    """The optimiser step at which a checkpoint was written."""
    return int(folder.name.partition("-")[2])


def remove(folders: Iterable[Path]) -> None:
    """Delete checkpoints; they stop counting before their first file goes."""
    for folder in folders:
        if folder.exists():
            leaving = folder.with_name(folder.name + _LEAVING)
            shutil.rmtree(leaving, ignore_errors=True)
            folder.rename(leaving)
            shutil.rmtree(leaving)


def sweep(run: Path) -> None:
    """Delete what killed writes and removals left behind."""
    for ending in (_WRITING, _LEAVING):
        for folder in run.glob(f"checkpoint-*{ending}"):
            shutil.rmtree(folder)


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
