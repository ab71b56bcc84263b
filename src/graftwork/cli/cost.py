"""graftwork cost MODEL TECHNIQUE: what training would take, without loading a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from graftwork.cli.assignments import pairs
from graftwork.errors import BadOption

if TYPE_CHECKING:
    from graftwork.analysis.cost import Cost
    from graftwork.reference.technique import Technique


def cost(
    model: Annotated[str, typer.Argument(help="minilm, a small host, a folder or a hub name.")],
    techniques: Annotated[
        list[str], typer.Argument(help="Techniques, each with its options behind it: lora rank=4 ia3")
    ],
    task: Annotated[str | None, typer.Option(help="Task whose head the model gets.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 8,
    sequence: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 128,
    optimiser: Annotated[str, typer.Option(help="adamw, momentum, sgd or adafactor.")] = "adamw",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations.")] = False,
) -> None:
    """Predict parameters, bytes and operations of training, side by side for several techniques."""
    wanted = chosen(techniques)
    from graftwork.analysis.cost import cost as predict
    from graftwork.cli.skeleton import skeleton

    options = {"batch": batch, "sequence": sequence, "optimiser": optimiser, "checkpointing": checkpointing}
    show([predict(skeleton(model, task), technique, **options) for technique in wanted])  # type: ignore[arg-type]


def chosen(words: Sequence[str]) -> list[Technique]:
    """`["lora", "rank=4", "ia3"]` as techniques; BadOption when an option has no technique before it."""
    from graftwork.reference.catalogue import make
    from graftwork.training import yaml

    found: list[tuple[str, dict[str, object]]] = []
    for word in words:
        if "=" not in word:
            found.append((word, {}))
        elif found:
            found[-1][1].update({name: yaml.parse(value, word) for name, value in pairs([word]).items()})
        else:
            raise BadOption(f"{word!r} stands before any technique; write the technique first: lora {word}")
    return [make(name, options) for name, options in found]


def show(costs: Sequence[Cost]) -> None:
    """One column per technique."""
    from rich.console import Console
    from rich.table import Table

    from graftwork.training.result import size

    table = Table("", *(cost.technique for cost in costs), box=None, header_style="bold")
    rows = {
        "base parameters": [f"{c.base_parameters:,}" for c in costs],
        "trainable parameters": [f"{c.trainable_parameters:,}" for c in costs],
        "trainable share": [f"{c.trainable_share:.3%}" for c in costs],
        "adapter file": [size(c.file_bytes) for c in costs],
        "weights": [size(c.weight_bytes) for c in costs],
        "gradients": [size(c.gradient_bytes) for c in costs],
        "optimiser": [size(c.optimiser_bytes) for c in costs],
        "activations": [size(c.activation_bytes) for c in costs],
        "training in all": [size(c.training_bytes) for c in costs],
        "forward": [f"{c.forward_flops / 1e9:,.2f} GFLOP" for c in costs],
        "training step": [f"{c.step_flops / 1e9:,.2f} GFLOP" for c in costs],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console().print(table)
