"""Tables of results for the terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from graftwork.training.result import RunResult


def print_result(result: RunResult) -> None:
    """Scores and costs of a run, by the first process."""
    if os.environ.get("RANK", "0") != "0":
        return
    from graftwork.training.result import size

    print_scores(result.scores)
    Console().print(
        f"{result.trainable:,} trainable values ({result.share:.3%}), file {size(result.file_bytes)}, "
        f"{result.seconds_per_step:.3f} s per step, peak {size(result.peak_bytes)} -> {result.output}",
        soft_wrap=True,
        highlight=False,
    )


def print_scores(scores: Mapping[str, Mapping[str, float]]) -> None:
    """One row per metric, one column per split."""
    table = Table("", *scores, box=None, header_style="bold")
    for name in dict.fromkeys(name for found in scores.values() for name in found):
        table.add_row(name, *(_text(found.get(name)) for found in scores.values()))
    Console().print(table)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
