"""graftwork runs RUN...: finished runs side by side, seeds taken together."""

from __future__ import annotations

from typing import Annotated

import typer


def runs(
    folders: Annotated[list[str], typer.Argument(help="Run folders.", metavar="RUN...")],
) -> None:
    """Scores and costs of finished runs as a Markdown table; runs that differ in the seed are one row.

    A seed that was run again counts once, by its newest run.
    """
    from graftwork.training.summary import read_runs, table

    names, rows = table(read_runs(folders))
    for cells in (names, ["---", *["---:"] * (len(names) - 1)], *rows):
        typer.echo(f"| {' | '.join(cells)} |")
