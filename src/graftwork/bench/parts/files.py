"""Saving an adapter and loading it onto a fresh model; bytes on disk."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from graftwork.bench import peer
from graftwork.bench.hosts import Host, share
from graftwork.bench.measure import once
from graftwork.bench.settings import DTYPES, Settings
from graftwork.bench.table import Table
from graftwork.bench.variants import LINEARS, base_of

PART = "files"
HEADINGS = ("library", "save, ms", "load, ms", "KiB on disk")


def measure(settings: Settings) -> list[Table]:
    """One table per host, in the first precision asked for."""
    return [_table(settings, host) for host in settings.hosts]


def _table(settings: Settings, host: Host) -> Table:
    base = base_of(host, DTYPES[settings.dtypes[0]], settings.device)
    table = Table(PART, f"{host.name}, LoRA r16 on all linears", HEADINGS)
    turns = [_own(base) for _ in range(settings.rounds)]
    table.rows.append(("graftwork", *_medians(turns)))
    if peer.available():
        table.rows.append((peer.NAME, *_medians([_theirs(base, host) for _ in range(settings.rounds)])))
    else:
        table.notes.append(peer.ABSENT)
    return table


def _medians(turns: list[tuple[float, float, float]]) -> tuple[float, ...]:
    return tuple(statistics.median(column) for column in zip(*turns, strict=True))


def _own(base: nn.Module) -> tuple[float, float, float]:
    from graftwork.adapters.store import load, save
    from graftwork.engine.attach import attach
    from graftwork.techniques.lora import LoRA

    model, fresh = share(base), share(base)
    attach(model, LoRA(rank=16, alpha=32, workspaces=LINEARS))
    with tempfile.TemporaryDirectory() as folder:
        written = once(lambda: save(model, folder))
        return written * 1e3, once(lambda: load(fresh, folder)) * 1e3, _kib(folder)


def _theirs(base: nn.Module, host: Host) -> tuple[float, float, float]:
    import peft

    model, fresh = peer.wrap(share(base), peer.lora(host)), share(base)
    with tempfile.TemporaryDirectory() as folder:
        written = once(lambda: model.save_pretrained(folder))
        load: Any = peft.PeftModel.from_pretrained
        return written * 1e3, once(lambda: load(fresh, folder)) * 1e3, _kib(folder)


def _kib(folder: str) -> float:
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 1024
