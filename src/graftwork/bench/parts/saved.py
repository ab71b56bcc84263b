"""Bytes that autograd keeps from the forward pass to the backward pass: exact, each storage once."""

from __future__ import annotations

from collections.abc import Mapping

from graftwork.analysis.saved import saved_bytes
from graftwork.bench import training
from graftwork.bench.settings import Settings
from graftwork.bench.table import Goal, Table
from graftwork.bench.training import Key
from graftwork.bench.variants import Subject, Variant, variants

PART = "saved"
_NO_LARGER = {"(IA)3": 1.0, "prefix tuning, 20": 1.0, "prompt tuning, 20": 1.0, "norm tuning": 1.0}
PLAIN, DROPOUT = "LoRA r16, all linears", "LoRA r16, dropout 0.05"
GOALS: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("llama", "fp32"): {PLAIN: 1.0, "LoRA r16, lean host": 0.66, **_NO_LARGER},
    ("llama", "bf16"): {PLAIN: 0.66, "LoRA r16, lean host": 0.38, **_NO_LARGER},
}
MIB = 2**20


def measure(settings: Settings, chosen: tuple[Variant, ...] | None = None) -> list[Table]:
    """One table per host and precision."""
    chosen = variants() if chosen is None else chosen
    out = []
    for host, name, dtype in settings.beds():
        batch = host.batch_of(settings.device)
        found = training.collect(settings, host, dtype, chosen, lambda s: kept_by(s, batch) / MIB)  # noqa: B023
        kept = found.figures
        table = Table(PART, training.titled(host, name, settings), training.headed("MiB", "trained"))
        table.rows = training.rows(chosen, kept, quotient(kept), found.trained.get)
        table.notes = training.notes(found)
        limits = GOALS.get((host.name, name), {})
        table.goals = training.goals(limits, quotient(kept), f"{name} saved bytes")
        if limits and (PLAIN, "ours") in kept and (DROPOUT, "ours") in kept:
            more = kept[DROPOUT, "ours"] - kept[PLAIN, "ours"]
            table.goals.append(Goal(f"dropout 0.05 adds to saved bytes, {name}", 0.0, more, "MiB"))
        out.append(table)
    return out


def kept_by(subject: Subject, batch: Mapping[str, object]) -> int:
    """Bytes between the passes, without parameters, buffers and the batch."""
    there = [*subject.model.parameters(), *subject.model.buffers(), *batch.values()]
    return saved_bytes(lambda: subject.model(**batch).loss, there)


def quotient(figures: Mapping[Key, float]) -> training.Ratio:
    """Ratios of single figures."""

    def ratio(one: Key, other: Key) -> float | None:
        return figures[one] / figures[other] if one in figures and other in figures else None

    return ratio
