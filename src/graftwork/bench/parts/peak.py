"""Bytes at the highest point of a training step, above weights and optimiser state."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import Tensor

from graftwork.bench import training
from graftwork.bench.measure import peak_rise
from graftwork.bench.parts.saved import MIB, quotient
from graftwork.bench.settings import Settings
from graftwork.bench.table import Cell, Table
from graftwork.bench.training import Key
from graftwork.bench.variants import Subject, Variant, variants

PART = "peak"


def measure(settings: Settings, chosen: tuple[Variant, ...] | None = None) -> list[Table]:
    """One table per host and precision; "in all" adds weights and optimiser state."""
    chosen = variants() if chosen is None else chosen
    out = []
    for host, name, dtype in settings.beds():
        batch = host.batch_of(settings.device)
        probe = functools.partial(_probe, batch=batch, device=settings.device)
        found = training.collect(settings, host, dtype, chosen, probe)
        rise = {key: top / MIB for key, (top, _) in found.figures.items()}
        whole: dict[Key, Cell] = {key: (top + there) / MIB for key, (top, there) in found.figures.items()}
        table = Table(PART, training.titled(host, name, settings), training.headed("MiB", "in all"))
        table.rows = training.rows(chosen, rise, quotient(rise), whole.get)
        table.notes = training.notes(found)
        out.append(table)
    return out


def _probe(subject: Subject, batch: Mapping[str, Tensor], device: str) -> tuple[int, int]:
    """The rise in the second step, when the optimiser's state is there; and what is resident."""
    step = training.stepper(subject, batch)
    step()
    return peak_rise(step, device), resident(subject)


def resident(subject: Subject) -> int:
    """Bytes of weights, buffers and AdamW's two moments."""
    every = {id(t): t for t in (*subject.model.parameters(), *subject.model.buffers())}
    moments = 2 * sum(p.numel() * p.element_size() for p in subject.trained)
    return sum(t.numel() * t.element_size() for t in every.values()) + moments
