"""graftwork bench [PART...]: time and memory beside the frozen floor, full fine-tuning and HF PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from graftwork.bench.settings import Settings
    from graftwork.bench.table import Table


def bench(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            help="step, saved, weights, spectral, peak, mixed, crowd, shelf, many, inactive, merge, files, imports, "
            "quantised; all by default."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="llama, minilm or llama-1b (repeat it); llama and minilm by default."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Precision of the base: fp32 or bf16 (repeat it); both by default."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each training step takes.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Also write every figure here.")] = None,
    write: Annotated[
        Path | None, typer.Option(help="Also renew the section of this page that is marked for the device.")
    ] = None,
) -> None:
    """Measure graftwork side by side with HF PEFT, taking turns in one process; goals are marked reached or not."""
    from rich.console import Console

    from graftwork.bench.machine import facts
    from graftwork.bench.registry import chosen
    from graftwork.bench.table import markdown, rich_goals
    from graftwork.cli.quiet import quiet

    names, settings = chosen(parts or []), settings_of(model, dtype, device, rounds)
    quiet()
    machine, console = facts(device), Console()
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    tables = [table for name in names for table in shown(name, settings, console)]
    if any(table.goals for table in tables):
        console.print(rich_goals(tables))
    if json is not None:
        write_json(json, machine, settings, tables)
    if write is not None:
        from graftwork.bench.page import renew

        renew(write, device, markdown(tables, machine))


def settings_of(model: list[str] | None, dtype: list[str] | None, device: str, rounds: int) -> Settings:
    """The run that the options ask for; each unknown name is an error with the nearest one."""
    import torch

    from graftwork.bench.hosts import HOSTS
    from graftwork.bench.settings import DTYPES, Settings
    from graftwork.errors import BadOption

    hosts, dtypes = model or ["llama", "minilm"], dtype or list(DTYPES)
    _known("model", hosts, list(HOSTS))
    _known("dtype", dtypes, list(DTYPES))
    _known("device", [device], ["cpu", "cuda"])
    if device == "cuda" and not torch.cuda.is_available():
        raise BadOption("device=cuda, but torch sees no accelerator here; use --device cpu")
    picked = tuple(HOSTS[name] for name in hosts)
    return Settings(hosts=picked, dtypes=tuple(dtypes), device=device, rounds=rounds)


def _known(option: str, given: list[str], known: list[str]) -> None:
    from graftwork.errors import UnknownName, nearest

    for name in given:
        if name not in known:
            raise UnknownName(f"--{option} {name!r}. {nearest(name, known)}")


def shown(name: str, settings: Settings, console: object) -> list[Table]:
    """Measure one part and print its tables."""
    from rich.console import Console

    from graftwork.bench.registry import PARTS, part
    from graftwork.bench.table import rich_table

    assert isinstance(console, Console)
    with console.status(f"{name}: {PARTS[name]}"):
        tables = part(name)(settings)
    for table in tables:
        console.print(rich_table(table))
        for note in table.notes:
            console.print(f"  {note}", style="dim", highlight=False, markup=False)
    return tables


def write_json(file: Path, machine: dict[str, object], settings: Settings, tables: list[Table]) -> None:
    """Machine, settings and every figure as measured."""
    import json

    asked = {
        "hosts": [host.name for host in settings.hosts],
        "dtypes": list(settings.dtypes),
        "device": settings.device,
        "rounds": settings.rounds,
    }
    result = {"machine": machine, "settings": asked, "tables": [table.plain() for table in tables]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
