"""graftwork demo: five ways to tune MiniLM on the standard library's docstrings, compared live."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from graftwork.training.recipe import Recipe

HEAD_RATE = 0.06  # MiniLM's pooled features are small, so its head learns faster than the rest
BODY = ["embedding", "embedding.*", "norm", "norm.final", "attention.*", "feedforward.*", "pooler"]
WAYS: dict[str, tuple[list[dict[str, Any]], float]] = {
    "linear probe": ([], HEAD_RATE),
    "LoRA": ([{"name": "lora", "rank": 8, "workspaces": ["all-linear"]}], 3e-3),
    "(IA)3": ([{"name": "ia3"}], 1e-2),
    "Pfeiffer adapter": ([{"name": "bottleneck-adapter"}], 3e-3),
    "full fine-tuning": ([{"name": "fine-tuning", "workspaces": BODY}], 2e-4),
}
TITLE = "MiniLM on the subjects of Python's standard library"


def demo(
    out: Annotated[Path, typer.Option(help="Where runs and report go.")] = Path("runs/demo"),
    rows: Annotated[int, typer.Option(min=64, help="Training rows.")] = 1920,
    steps: Annotated[int, typer.Option(min=4, help="Optimiser steps of each way.")] = 120,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Tune MiniLM by LoRA, (IA)3 and a Pfeiffer adapter, beside linear probe and full fine-tuning."""
    import time

    from graftwork.cli.quiet import quiet

    quiet(logging.ERROR)  # that texts are cut is meant here
    from graftwork.cli.comparison import Comparison
    from graftwork.training.report import write_report
    from graftwork.training.run import tune

    start = time.perf_counter()
    with Comparison(list(WAYS)) as table:
        for name in WAYS:
            plan = recipe(name, out, rows, steps, seed)
            table.done(name, tune(plan, overwrite=True, watch=table.watch(name)))
    page = write_report(table.results, out, TITLE)
    typer.echo(f"\n{time.perf_counter() - start:.0f} s; report: {page}")


def recipe(name: str, out: Path, rows: int, steps: int, seed: int) -> Recipe:
    """The recipe of one way; all see the same rows in the same order."""
    from graftwork.training.recipe import Recipe

    techniques, rate = WAYS[name]
    head = {"name": "fine-tuning", "workspaces": ["head"], "rate": round(HEAD_RATE / rate, 6)}
    return Recipe.of(
        {
            "model": "minilm",
            "technique": [*techniques, head],
            "task": {"name": "text-classification", "max_length": 32},
            "data": {"train": "docstrings:subjects", "limit": rows, "evaluation_limit": max(rows // 8, 32)},
            "training": {
                "steps": steps,
                "batch_size": 16,
                "learning_rate": rate,
                "evaluate_every": max(steps // 4, 1),
                "log_every": max(steps // 20, 1),
                "save_every": "never",
                "order": "length",
                "seed": seed,
            },
            "output": str(out / name.lower().replace(" ", "-").replace("(", "").replace(")", "")),
        }
    )
