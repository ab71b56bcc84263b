"""A thousand registered adapters of which each batch uses 32, beside 32 that are attached for good."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from pathlib import Path

import torch
from torch import nn

from graftwork.bench.hosts import Host, share
from graftwork.bench.measure import once
from graftwork.bench.settings import DTYPES, Settings
from graftwork.bench.table import Goal, Table
from graftwork.bench.variants import base_of

PART = "shelf"
REGISTERED, USED, BATCHES, TOKENS, RANK = 1000, 32, 12, 64, 8
PLACES = ("attention.query", "attention.value")
HEADINGS = (
    "adapters",
    "batch, ms",
    "/ attached",
    "bringing on, ms each",
    "MiB on the model",
    "MiB in memory",
)


def measure(settings: Settings, registered: int = REGISTERED, used: int = USED) -> list[Table]:
    """One table per causal host, in the first precision asked for."""
    return [_table(settings, host, registered, used) for host in settings.causal]


def _table(settings: Settings, host: Host, registered: int, used: int) -> Table:
    dtype = settings.dtypes[0]
    base = base_of(host, DTYPES[dtype], settings.device).eval()
    about = (
        f"{host.name}, LoRA r{RANK} on query and value; base in {dtype}, {settings.device}; {used} x {TOKENS}"
    )
    table = Table(PART, about, HEADINGS)
    ids = torch.randint(3, host.vocabulary, (used, TOKENS), device=settings.device)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        names = _files(base, Path(folder), registered)
        attached = _attached(share(base), Path(folder), names[:used], ids)
        table.rows.append(
            (f"{used} attached for good", attached, 1.0, None, _mib(base, names[:used], folder), None)
        )
        few = _served(share(base), Path(folder), names[:used], used, ids)
        many = _served(share(base), Path(folder), names, used, ids)
        for count, (spent, brought, held, kept) in ((used, few), (registered, many)):
            what = f"{count} registered, {used} a batch"
            table.rows.append((what, spent, spent / attached, brought or None, held, kept))
    table.notes = [
        f"each batch of the last row names {used} adapters drawn anew; 'batch' includes bringing them onto the model",
        "memory counts tensors of adapters, in host memory one copy of each file that was read",
    ]
    if host.name == "llama":
        table.goals = [
            Goal(f"{registered} registered: memory on the model, of {used}", 1.0, many[2] / few[2], "x")
        ]
    return table


def _files(base: nn.Module, folder: Path, count: int) -> list[str]:
    """One real file, and copies of it: what is read and brought on does not depend on the values."""
    from graftwork.adapters.store import save
    from graftwork.engine.attach import attach
    from graftwork.techniques.lora import LoRA

    model = share(base)
    attach(model, LoRA(rank=RANK, workspaces=PLACES), name="a0")
    first = save(model, folder)
    names = [f"a{number}" for number in range(count)]
    for name in names[1:]:
        shutil.copyfile(first, folder / f"{name}.safetensors")
    return names


def _attached(model: nn.Module, folder: Path, names: list[str], ids: torch.Tensor) -> float:
    from graftwork.adapters.store import load
    from graftwork.engine.verbs import route

    for name in names:
        load(model, folder / f"{name}.safetensors", name=name)

    def batch() -> None:
        with route(model, names, torch.arange(len(names))):
            model(input_ids=ids)

    batch()
    return statistics.median(once(batch) for _ in range(BATCHES)) * 1e3


def _served(
    model: nn.Module, folder: Path, names: list[str], used: int, ids: torch.Tensor
) -> tuple[float, float, float, float]:
    """Median ms of a batch, of that ms to bring on one adapter, MiB on the model, MiB in host memory."""
    from graftwork.engine.verbs import adapters
    from graftwork.serving import Shelf
    from graftwork.techniques.lora import LoRA

    shelf = Shelf(model, LoRA(rank=RANK, workspaces=PLACES), places=used)
    for name in names:
        shelf.register(name, folder / f"{name}.safetensors")
    shelf.prefetch(names, wait=True)
    draw = torch.Generator().manual_seed(0)
    spent, brought = [], []
    for turn in range(-2, BATCHES):
        rows = [names[n] for n in torch.randperm(len(names), generator=draw)[:used].tolist()]
        new = len(set(rows) - set(shelf.on_model))

        def bring(rows: list[str] = rows) -> None:
            with shelf.serve(rows):
                pass

        def batch(rows: list[str] = rows) -> None:
            with shelf.serve(rows):
                model(input_ids=ids)

        before = once(bring)
        seconds = before + once(batch)
        if turn >= 0:
            spent.append(seconds)
            brought += [before / new] if new else []
    held = sum(p.numel() * p.element_size() for a in adapters(model).values() for p in a.parameters()) / 2**20
    kept = held / used * len(names)
    shelf.close()
    return statistics.median(spent) * 1e3, statistics.median(brought or [0.0]) * 1e3, held, kept


def _mib(base: nn.Module, names: list[str], folder: str) -> float:
    from graftwork.adapters.store import load

    model = share(base)
    adapter = load(model, Path(folder) / f"{names[0]}.safetensors")
    return len(names) * sum(p.numel() * p.element_size() for p in adapter.parameters()) / 2**20
