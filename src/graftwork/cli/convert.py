"""graftwork convert IN OUT: an adapter in the other format."""

from __future__ import annotations

from typing import Annotated

import typer


def convert(
    source: Annotated[str, typer.Argument(help="A run folder, an adapter file, or the folder of one.")],
    target: Annotated[str, typer.Argument(help="Where to write.")],
    format: Annotated[str, typer.Option(help="hf-peft or graftwork.")] = "hf-peft",
    base: Annotated[
        str | None, typer.Option(help="Base model, where an HF PEFT folder does not tell.")
    ] = None,
) -> None:
    """Write an adapter in the other format."""
    from graftwork.adapters.convert import convert as write

    typer.echo(str(write(source, target, format=format, base=base)))
