"""curves.png: loss and scores over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graftwork.training.journal import Record

LOSS, SCORE = "#1f5fa8", "#c2571a"


def draw(records: Sequence[Record], best_metric: str, kept_step: int, path: Path) -> None:
    """Losses on the left, the deciding score on the right; a dotted line marks the kept step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    _line(left, records, "loss", "training", LOSS)
    _line(left, records, "eval_loss", "validation", SCORE, marker="o")
    _line(right, records, f"eval_{best_metric}", best_metric, SCORE, marker="o")
    left.set_ylabel("loss")
    right.set_ylabel(best_metric)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.axvline(kept_step, color="0.6", linewidth=1, linestyle=":", label="kept")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    left.set_xlim(left=0)
    figure.savefig(path)


def _line(
    axes: object, records: Sequence[Record], key: str, label: str, color: str, marker: str = ""
) -> None:
    points = [(record["step"], record[key]) for record in records if key in record]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=label, color=color, marker=marker, markersize=4)  # type: ignore[attr-defined]
