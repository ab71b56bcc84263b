"""graftwork tune RECIPE: train an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def tune(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML (see examples/).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it: training.epochs=3 technique.rank=4")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Accept a finished run as it is instead of refusing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what an earlier run left in the output folder.")
    ] = False,
) -> None:
    """Train an adapter as a recipe says; an interrupted run of the same recipe goes on where it was."""
    from graftwork.cli.quiet import quiet

    quiet()
    from graftwork.training.recipe import Recipe

    plan = Recipe.load(recipe, overrides or ())
    from graftwork.cli.progress import watching
    from graftwork.cli.results import print_result
    from graftwork.training.run import tune as run

    names = " + ".join(technique.name for technique in plan.techniques())
    with watching(names) as watch:
        result = run(plan, resume=resume, overwrite=overwrite, watch=watch)
    print_result(result)
