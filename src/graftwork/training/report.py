"""Several runs side by side: report.md with its plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from graftwork.training.folder import RunFolder
from graftwork.training.journal import Journal, write_text
from graftwork.training.result import RunResult, size

COLORS = ("#7f7f7f", "#1f5fa8", "#c2571a", "#3f8f4f", "#7b4fa3", "#b0a030", "#2f9fa8", "#a83f6f")
COLUMNS = ("", "trained", "share", "file", "score", "loss", "s/step", "GFLOP/step", "peak memory")


def write_report(results: Mapping[str, RunResult], folder: Path, title: str) -> Path:
    """Write report.md and report.png into `folder`; returns the page."""
    draw(results, folder / "report.png")
    page = folder / "report.md"
    write_text(page, text(results, title))
    return page


def rows(results: Mapping[str, RunResult]) -> list[tuple[str, ...]]:
    """One row per run, as `COLUMNS` names them; scores are on the test split where there is one."""
    return [
        (
            name,
            f"{r.trainable:,}",
            f"{r.share:.2%}",
            size(r.file_bytes),
            f"{_test(r)[r.best_metric]:.3f}",
            f"{_test(r)['loss']:.3f}",
            f"{r.seconds_per_step:.3f}",
            f"{r.flops_per_step / 1e9:,.1f}",
            size(r.peak_bytes),
        )
        for name, r in results.items()
    ]


def text(results: Mapping[str, RunResult], title: str) -> str:
    """The page as Markdown."""
    first = next(iter(results.values()))
    head = [c.replace("score", first.best_metric) for c in COLUMNS]
    table = [_row(head), _row(["---", *["---:"] * (len(head) - 1)]), *map(_row, rows(results))]
    what = ", ".join(f"{count:,} {split}" for split, count in first.examples.items())
    details = [f"- **{name}**: {' + '.join(r.techniques)}, {r.steps} steps" for name, r in results.items()]
    lines = [
        f"# {title}",
        "",
        f"{first.task} on {first.model}: {what} examples; scores on the {_split(first)} split.",
        "",
        *table,
        "",
        "![scores and curves](report.png)",
        "",
        *details,
        "",
        "Each run folder beside this page holds its recipe, metrics, adapter and card; "
        "`graftwork tune RUN/recipe.yaml output=NEW` repeats one.",
        "",
    ]
    return "\n".join(lines)


def draw(results: Mapping[str, RunResult], path: Path) -> None:
    """Score against trained parameters on the left, validation score over the steps on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (name, result) in zip(_cycle(len(results)), results.items(), strict=True):
        score = _test(result)[result.best_metric]
        left.scatter(result.trainable, score, color=color, s=45, zorder=3)
        left.annotate(name, (result.trainable, score), xytext=(0, 7), textcoords="offset points", ha="center")
        steps, values = _curve(result)
        right.plot(steps, values, color=color, marker="o", markersize=4, label=name)
    metric = next(iter(results.values())).best_metric
    left.set_xscale("log")
    left.margins(x=0.18, y=0.18)
    left.set(xlabel="trained parameters", ylabel=f"{metric} ({_split(next(iter(results.values())))})")
    right.set(xlabel="step", ylabel=f"{metric} (validation)")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _curve(result: RunResult) -> tuple[list[float], list[float]]:
    key = f"eval_{result.best_metric}"
    records = Journal(RunFolder(Path(result.output)).metrics).records()
    points = [(r["step"], r[key]) for r in records if key in r]
    return [step for step, _ in points], [value for _, value in points]


def _split(result: RunResult) -> str:
    return "test" if "test" in result.scores else "validation"


def _test(result: RunResult) -> Mapping[str, float]:
    return result.scores[_split(result)]


def _cycle(count: int) -> list[str]:
    return [COLORS[number % len(COLORS)] for number in range(count)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
