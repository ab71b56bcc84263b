"""graftwork evaluate RUN_OR_ADAPTER: score an adapter again."""

from __future__ import annotations

from typing import Annotated

import typer

from graftwork.cli.assignments import pairs


def evaluate(
    source: Annotated[str, typer.Argument(help="A run folder, or an adapter file with --model and --task.")],
    data: Annotated[str | None, typer.Option(help="What to score on; a run's own data otherwise.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model (minilm, a small host, a folder).")] = None,
    task: Annotated[str | None, typer.Option(help="Task, for an adapter file.")] = None,
    split: Annotated[
        str | None, typer.Option(help="train, validation or test; test where there is one if not said.")
    ] = None,
    column: Annotated[list[str] | None, typer.Option(help="ROLE=COLUMN of the data, repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 64,
) -> None:
    """Score an adapter on its own data or on other."""
    columns = pairs(column) if column else None
    from graftwork.cli.quiet import quiet

    quiet()
    from graftwork.cli.results import print_scores
    from graftwork.training.evaluate import evaluate as score

    scores = score(
        source,
        data,
        model=model,
        task=task,
        split=split,
        columns=columns,
        limit=limit,
        batch_size=batch_size,
    )
    print_scores({split or "score": scores})
