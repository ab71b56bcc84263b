"""Time of a training step: forward, backward, AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from graftwork.bench import training
from graftwork.bench.measure import Times, interleaved
from graftwork.bench.settings import Settings
from graftwork.bench.table import Table
from graftwork.bench.training import Key
from graftwork.bench.variants import Subject, Variant, variants

PART = "step"
_NO_SLOWER = {"(IA)3": 1.0, "prefix tuning, 20": 1.0, "prompt tuning, 20": 1.0, "norm tuning": 1.0}
GOALS: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("llama", "fp32"): {
        "LoRA r16, all linears": 0.97,
        "LoRA r16, dropout 0.05": 0.90,
        "LoRA r16, lean host": 1.0,
        **_NO_SLOWER,
    },
    ("llama", "bf16"): {
        "LoRA r16, all linears": 0.80,
        "LoRA r16, dropout 0.05": 0.75,
        "LoRA r16, lean host": 1.0,
        **_NO_SLOWER,
    },
}


def measure(settings: Settings, chosen: tuple[Variant, ...] | None = None) -> list[Table]:
    """One table per host and precision."""
    chosen = variants() if chosen is None else chosen
    out = []
    for host, name, dtype in settings.beds():
        batch = host.batch_of(settings.device)
        found = training.collect(settings, host, dtype, chosen, lambda s: tried(s, batch))  # noqa: B023
        times = interleaved(found.figures, settings.rounds, device=settings.device)
        ratio = time_ratio(times)
        milliseconds = {key: time.median * 1e3 for key, time in times.items()}
        spread = {key: f"{time.spread:.0%}" for key, time in times.items()}
        table = Table(PART, training.titled(host, name, settings), training.headed("ms", "spread"))
        table.rows = training.rows(chosen, milliseconds, ratio, spread.get)
        table.notes = training.notes(found)
        table.goals = training.goals(GOALS.get((host.name, name), {}), ratio, f"{name} time")
        out.append(table)
    return out


def tried(subject: Subject, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    """A training step, made once."""
    step = training.stepper(subject, batch)
    step()
    return step


def time_ratio(times: Mapping[Key, Times]) -> training.Ratio:
    """Median of the ratios within the rounds."""

    def ratio(one: Key, other: Key) -> float | None:
        return times[one].over(times[other]) if one in times and other in times else None

    return ratio
