"""graftwork study [NAME]: a paper's claim, measured at small size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from graftwork.studies.cells import Cell
    from graftwork.studies.session import Watch


def study(
    name: Annotated[str | None, typer.Argument(help="Which study; without it, all are listed.")] = None,
    seeds: Annotated[str, typer.Option(help="Repetitions, divided by commas.")] = "0,1,2",
    size: Annotated[str, typer.Option(help="small, for one CPU core, or full.")] = "small",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with data sets; $GRAFTWORK_DATA or ../shared/data by default, else embedded data."
        ),
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="Also write page, picture and measurements into this folder.")
    ] = None,
    store: Annotated[Path, typer.Option(help="Where measurements are kept as they come.")] = Path(
        "runs/studies"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what is stored and measure anew.")] = False,
) -> None:
    """Measure what a paper claims; an interrupted study goes on where it was."""
    from rich.console import Console

    if name is None:
        _list(Console())
        return
    from graftwork.cli.quiet import quiet
    from graftwork.studies import registry
    from graftwork.studies.cells import Cells
    from graftwork.studies.page import markdown
    from graftwork.studies.page import write as write_page
    from graftwork.studies.session import Session
    from graftwork.studies.study import Settings, Size, data_folder

    chosen = registry.study(name)
    settings = Settings(seeds=_seeds(seeds), size=cast(Size, size), data=data_folder(data))
    quiet()
    cells, console = Cells(registry.store(store, name, size)), Console()
    if fresh:
        cells.clear()
    with console.status(name) as status:
        session = Session(settings, cells, _watch(console, status.update))
        findings = chosen.run(session)
    _show(console, markdown(chosen, session, findings))
    if write is not None:
        console.print(f"written: {write_page(chosen, session, findings, write)}")


def _seeds(text: str) -> tuple[int, ...]:
    from graftwork.errors import BadOption

    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise BadOption(f"--seeds {text!r}: give whole numbers divided by commas, as in 0,1,2") from None


def _list(console: Console) -> None:
    from rich import box
    from rich.table import Table

    from graftwork.studies import registry

    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for heading in ("study", "claim", "source"):
        table.add_column(heading, overflow="fold")
    for name in registry.names():
        found = registry.study(name)
        table.add_row(name, found.claim, found.source)
    console.print(table)


def _watch(console: Console, update: Callable[[str], None]) -> Watch:
    def watch(what: str, cell: Cell | None) -> None:
        update(what)
        if cell is not None:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in cell.figures.items())
            console.print(
                f"{what}: {figures}  ({cell.seconds:.0f} s)",
                style="dim",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    return watch


def _show(console: Console, text: str) -> None:
    from rich.markdown import Markdown

    console.print(Markdown(text))
