"""graftwork merge ADAPTER OUT: a plain model with the adapter folded into its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import nn


def merge(
    adapter: Annotated[str, typer.Argument(help="A run folder, or an adapter file with --model and --task.")],
    out: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    model: Annotated[str | None, typer.Option(help="Base model; a run knows its own.")] = None,
    task: Annotated[str | None, typer.Option(help="Task, for an adapter file.")] = None,
) -> None:
    """Fold an adapter into its base and write a model that any tool reads; it is read back and compared."""
    from graftwork.cli.quiet import quiet

    quiet()
    from graftwork.errors import StateError

    if out.exists() and any(out.iterdir()):
        raise StateError(f"{out} exists and is not empty; choose a new folder")
    from graftwork.training.subject import open_subject

    subject = open_subject(adapter, model=model, task=task)
    if subject.recipe is not None and subject.recipe.contexts is not None:
        raise StateError(
            f"{adapter} holds several contexts ({', '.join(subject.recipe.contexts)}), each for its own tokens, and a "
            "merged base would be the same for all tokens; run them by their route, as `graftwork evaluate` does"
        )
    host, preprocessor = subject.load()
    from graftwork.engine.merging import merge as fold

    fold(host)
    write = host.save_pretrained
    write(out)  # type: ignore[operator]
    preprocessor.save_pretrained(out)
    compare(host, out)
    typer.echo(f"{out}: merged model, read back and found equal in every tensor")


def compare(host: nn.Module, out: Path) -> None:
    """Read the written model and refuse to call it good unless every tensor is that of `host`."""
    import torch

    from graftwork.engine.export import is_adapter_key
    from graftwork.errors import BadFile

    kind = type(host)
    again = kind.from_pretrained(out, dtype=next(host.parameters()).dtype).state_dict()  # type: ignore[attr-defined]
    kept = {key: tensor for key, tensor in host.state_dict().items() if not is_adapter_key(key)}
    wrong = [key for key, tensor in kept.items() if key not in again or not torch.equal(tensor, again[key])]
    if wrong:
        raise BadFile(f"{out} does not hold what was merged; tensors differ: {', '.join(wrong[:5])}")
