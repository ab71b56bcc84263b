"""graftwork pretrain NAME: make a small host from embedded data."""

from __future__ import annotations

from typing import Annotated

import typer


def pretrain(
    names: Annotated[list[str], typer.Argument(help="tiny-llama, tiny-gpt2, tiny-t5, ..., or all.")],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps instead of the host's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides the weights.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Make it again though it is in the cache.")] = False,
) -> None:
    """Pretrain small hosts on embedded data, in minutes on two cores, and keep them in the cache."""
    import json

    from graftwork.models.hosts import HOSTS
    from graftwork.models.pretraining import pretrain as pretrain_one

    for name in HOSTS if names == ["all"] else names:
        folder = pretrain_one(name, steps=steps, seed=seed, force=force)
        report = json.loads((folder / "metrics.json").read_text())
        learnt = f"loss {report['before']['loss']:.3f} -> {report['after']['loss']:.3f}"
        typer.echo(f"{name}: {report['parameters']:,} parameters, {learnt}, {report['seconds']} s, {folder}")
