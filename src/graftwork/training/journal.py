"""metrics.jsonl: one line per log or evaluation, and what was measured on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftwork.adapters.disk import write_atomically

Record = Mapping[str, float]
Watch = Callable[[Record, int], None]
NAMES = {"learning_rate": "lr"}
SUMMARY = ("train_runtime", "train_loss", "total_flos")


class Journal:
    """The lines of metrics.jsonl.

    Args:
        path: the file; created when missing.
        writes: whether this process writes it (one does).
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self._writes = path, writes

    def records(self) -> list[dict[str, float]]:
        """All whole lines; a half line that a kill left behind is passed over."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def cut(self, step: int) -> float:
        """Forget what was logged after `step`, to be done again; returns the seconds until there."""
        kept = [record for record in self.records() if record["step"] <= step]
        if self._writes:
            text = "".join(_line(record) for record in kept)
            write_text(self.path, text)
        return max((record["seconds"] for record in kept), default=0.0)

    def add(self, record: Record) -> None:
        """Append one line."""
        if self._writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(record))


def _line(record: Record) -> str:
    return json.dumps(dict(record)) + "\n"


def write_text(path: Path, text: str) -> None:
    """Give a file this content, in one step."""

    def write(out: BinaryIO) -> None:
        out.write(text.encode())

    write_atomically(path, write)


class Recorder(TrainerCallback):
    """Writes the journal, tells the watcher, times steps, and logs whenever a checkpoint is due.

    Args:
        before: seconds spent in earlier, interrupted parts of the run.
        watch: called with each record and the total number of steps.
    """

    def __init__(self, journal: Journal, before: float = 0.0, watch: Watch | None = None) -> None:
        self._journal, self._before, self._watch = journal, before, watch
        self._start = self._began = time.perf_counter()
        self._steps: list[float] = []

    @property
    def seconds_per_step(self) -> float:
        """Median over the steps of this process."""
        return median(self._steps) if self._steps else 0.0

    @property
    def seconds(self) -> float:
        """Since the start of the run, without the time it lay interrupted."""
        return self._before + time.perf_counter() - self._start

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._steps.append(time.perf_counter() - self._began)
        control.should_log = control.should_log or control.should_save or control.should_evaluate

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        found = {NAMES.get(k, k): v for k, v in (logs or {}).items() if not is_overhead(k)}
        if not found or any(key in found for key in SUMMARY):
            return
        record = {"step": state.global_step, **found, "seconds": round(self.seconds, 3)}
        self._journal.add(record)
        if self._watch is not None:
            self._watch(record, state.max_steps)


def is_overhead(key: str) -> bool:
    """Whether a number of transformers' is about its own speed, and no score."""
    return key.endswith(("runtime", "_per_second", "preparation_time")) and not key.startswith("train_")
