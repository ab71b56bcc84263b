"""graftwork evaluate RUN_OR_ADAPTER: score an adapter again."""

from __future__ import annotations

from typing import Annotated

import typer


def evaluate(
    source: Annotated[str, typer.Argument(help="A run folder, or an adapter file with --model and --task.")],
    data: Annotated[str | None, typer.Option(help="What to score on; a run's own data otherwise.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model (minilm, a small host, a folder).")] = None,
    task: Annotated[str | None, typer.Option(help="Task, for an adapter file.")] = None,
    split: Annotated[str | None, typer.Option(help="train, validation or test.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="ROLE=COLUMN of the data, repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 64,
) -> None:
    """Score an adapter on its own data or on other."""
    from graftwork.cli.results import print_scores
    from graftwork.training.evaluate import evaluate as score

    columns = pairs(column) if column else None
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


def pairs(assignments: list[str]) -> dict[str, str]:
    """`["text=sentence"]` as a mapping; raises BadOption on anything else."""
    from graftwork.errors import BadOption

    found = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not (name and equals and value):
            raise BadOption(f"{assignment!r} is not of the form NAME=VALUE")
        found[name] = value
    return found
