"""A progress bar for a run: step, loss, latest evaluation, time left."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from graftwork.training.journal import Watch


@contextmanager
def watching(title: str) -> Iterator[Watch]:
    """Shows a bar in the first process of a run; elsewhere records go by unseen."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[scores]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=os.environ.get("RANK", "0") != "0",
    )
    with bar:
        line = bar.add_task(title, total=None, scores="")
        latest: dict[str, float] = {}

        def show(record: Mapping[str, float], total: int) -> None:
            latest.update({k: v for k, v in record.items() if k == "loss" or k.startswith("eval_")})
            bar.update(line, completed=record["step"], total=total, scores=scores_text(latest))

        yield show


def scores_text(record: Mapping[str, float]) -> str:
    """`loss 0.412  accuracy 0.873`: the loss and the first scores of the latest evaluation."""
    scores = {
        k.removeprefix("eval_"): v for k, v in record.items() if k.startswith("eval_") and k != "eval_loss"
    }
    shown = {**({"loss": record["loss"]} if "loss" in record else {}), **dict(list(scores.items())[:2])}
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
