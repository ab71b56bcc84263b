"""graftwork compose EXPRESSION [ADAPTERS...] --out FOLDER: a new adapter out of trained ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from graftwork.composition.verbs import Composed

MINUS_FIRST = {"ignore_unknown_options": True}  # so that "-toxic" is an expression


def compose(
    expression: Annotated[
        str, typer.Argument(help="A weighted sum of names, 'a + 0.5*b - toxic'; paths in quotes.")
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(help="NAME=PATH, or folders whose adapters are meant by their file names."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the new adapter.")] = Path("."),
    name: Annotated[
        str | None, typer.Option(help="Of the new adapter; the folder's name if not said.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="parameters, concatenation, linear, ties, dare-linear, dare-ties or magnitude-pruning."
        ),
    ] = "parameters",
    rank: Annotated[int | None, typer.Option(help="Of the result, for methods that cut it.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of values kept, for sparse methods.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draw, for dare-linear and dare-ties.")] = None,
    through: Annotated[
        str | None, typer.Option(help="Tensor that carries the sign under 'parameters', as down for a LoRA.")
    ] = None,
    head: Annotated[
        str, typer.Option(help="Task heads: merge, none, or the adapter whose head is kept.")
    ] = "merge",
) -> None:
    """Add, subtract and scale adapters; the operands stay as they are."""
    from graftwork.adapters.names import as_adapter_name
    from graftwork.composition.methods import make_method
    from graftwork.composition.verbs import compose as write

    given = {"rank": rank, "density": density, "seed": seed, "through": through}
    chosen = make_method(method, {key: value for key, value in given.items() if value is not None})
    called = name or as_adapter_name(out.resolve().name)
    made = write(out, expression, name=called, method=chosen, head=head, operands=named(adapters or ["."]))
    typer.echo(_said(made))


def named(adapters: Sequence[str]) -> dict[str, Path]:
    """Name -> path, from NAME=PATH and folders. Raises BadOption for a name given twice or no such folder."""
    from graftwork.adapters.store import SUFFIX
    from graftwork.errors import BadOption

    found: dict[str, Path] = {}
    for text in adapters:
        name, equals, path = text.partition("=")
        if not equals and not Path(text).is_dir():
            raise BadOption(f"{text!r} is neither NAME=PATH nor a folder of adapters")
        new = {name: Path(path)} if equals else {p.stem: p for p in sorted(Path(text).glob(f"*{SUFFIX}"))}
        for key in new.keys() & found.keys():
            raise BadOption(
                f"two adapters are called {key!r} ({found[key]} and {new[key]}); name one: NAME=PATH"
            )
        found |= new
    return found


def _said(made: Composed) -> str:
    if not made.energies:
        return str(made.path)
    lowest = min(made.energies, key=lambda key: made.energies[key].share)
    return (
        f"{made.path}: {made.retained:.1%} of the squared norm of the updates retained, least at {lowest} "
        f"({made.energies[lowest].share:.1%})"
    )
