"""A study's curves as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftwork.studies.findings import Plot

_COLOURS = ("#1f5fa8", "#c2571a", "#2f8f5b", "#8a3fa0", "#b8a000", "#4d4d4d", "#d1495b", "#00798c")


def draw(plots: Sequence[Plot], path: Path) -> None:
    """Write a PNG with the plots side by side; a band shows one standard deviation over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(plots), 3.8), dpi=130, layout="constrained")
    for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
        _fill(axes, plot)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _fill(axes: Any, plot: Plot) -> None:
    for curve, colour in zip(plot.curves, _COLOURS * (1 + len(plot.curves) // len(_COLOURS)), strict=False):
        x, y = zip(*curve.points, strict=True)
        axes.plot(x, y, label=curve.arm, color=colour, marker="o", markersize=3)
        if curve.deviation:
            low, high = zip(*((v - d, v + d) for v, d in zip(y, curve.deviation, strict=True)), strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y, yscale="log" if plot.log else "linear")
    if plot.log:
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
