"""The command `graftwork`: one file per verb; a verb's heavy imports happen when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from graftwork.cli import (
    anatomy,
    bench,
    compose,
    convert,
    cost,
    demo,
    docs,
    evaluate,
    merge,
    pretrain,
    runs,
    study,
    techniques,
    tune,
)
from graftwork.errors import GraftworkError

app = typer.Typer(
    name="graftwork",
    help="Graft small trainable modules onto a pretrained model, train them, and know what they cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("tune")(tune.tune)
app.command("evaluate")(evaluate.evaluate)
app.command("runs")(runs.runs)
app.command("cost")(cost.cost)
app.command("anatomy")(anatomy.anatomy)
app.command("techniques")(techniques.show)
app.command("merge")(merge.merge)
app.command("compose", context_settings=compose.MINUS_FIRST)(compose.compose)
app.command("convert")(convert.convert)
app.command("pretrain")(pretrain.pretrain)
app.command("demo")(demo.demo)
app.command("bench")(bench.bench)
app.command("study")(study.study)
app.command("docs")(docs.docs)

TRACEBACK = "--traceback"


@app.callback()
def options(
    traceback: bool = typer.Option(
        False, TRACEBACK, help="Show where an error was raised (at any position)."
    ),
) -> None:
    """Graft small trainable modules onto a pretrained model, train them, and know what they cost."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 when it worked, 2 with one message when the input was at fault."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    try:
        command(args=[a for a in given if a != TRACEBACK], prog_name="graftwork")
    except GraftworkError as error:
        if TRACEBACK in given:
            raise
        leave(str(error))


def leave(message: str) -> None:
    """Say what was wrong, in one message, and exit with 2."""
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]Error:[/] {escape(message)}")
    sys.exit(2)


if __name__ == "__main__":
    main()
