"""Step time and saved bytes of the techniques that change weights in other ways than plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from graftwork.bench import training
from graftwork.bench.measure import interleaved
from graftwork.bench.parts.peak import resident
from graftwork.bench.parts.saved import MIB, kept_by, quotient
from graftwork.bench.parts.step import time_ratio, tried
from graftwork.bench.settings import Settings
from graftwork.bench.table import Goal, Table
from graftwork.bench.training import Ratio
from graftwork.bench.variants import FULL, Subject
from graftwork.bench.weight_variants import weight_variants

PART = "weights"
PLAIN, DECOMPOSED = "LoRA r16, all linears", "DoRA r16"
KRONECKER = ("LoHa r8", "LoKr r8")
SPARSE, BESIDE = "S2FT, as many values", "LoRA r16, output and down"
EQUAL = dict.fromkeys(("MiSS r16", "OFT block 32", "HRA r8", "VeRA r256, gate and up"), 1.0)
TIMES: Mapping[str, Mapping[str, float]] = {
    "fp32": {DECOMPOSED: 0.80, **dict.fromkeys(KRONECKER, 0.70), **EQUAL},
    "bf16": {DECOMPOSED: 0.60, **dict.fromkeys(KRONECKER, 0.55), **EQUAL},
}
BYTES: Mapping[str, Mapping[str, float]] = {
    "fp32": {DECOMPOSED: 0.60, **dict.fromkeys(KRONECKER, 0.85), **EQUAL},
    "bf16": {DECOMPOSED: 0.43, **dict.fromkeys(KRONECKER, 0.56), **EQUAL},
}


def measure(settings: Settings) -> list[Table]:
    """Two tables per host and precision: time, then bytes."""
    chosen, out = weight_variants(), []
    for host, name, dtype in settings.beds():
        batch = host.batch_of(settings.device)
        steps = training.collect(settings, host, dtype, chosen, lambda s: tried(s, batch))  # noqa: B023
        times = interleaved(steps.figures, settings.rounds, device=settings.device)
        timed = time_ratio(times)
        table = Table(PART, training.titled(host, name, settings), training.headed("ms", "spread"))
        spread = {key: f"{time.spread:.0%}" for key, time in times.items()}
        table.rows = training.rows(chosen, {k: t.median * 1e3 for k, t in times.items()}, timed, spread.get)
        table.notes = training.notes(steps)
        found = training.collect(settings, host, dtype, chosen, lambda s: (kept_by(s, batch), resting(s)))  # noqa: B023
        kept = {key: saved / MIB for key, (saved, _) in found.figures.items()}
        ratio, in_all = (
            quotient(kept),
            quotient({key: float(sum(both)) for key, both in found.figures.items()}),
        )
        second = replace(table, headings=training.headed("MiB", "trained"), goals=[], notes=[])
        second.rows = training.rows(chosen, kept, ratio, found.trained.get)
        if host.name == "llama":
            table.goals = [
                *training.goals(TIMES[name], timed, f"{name} time"),
                *_own(timed, f"{name} time", 1.20),
                *(
                    _against(timed, k, FULL, FULL, f"{name} time of full fine-tuning's", 1.0)
                    for k in KRONECKER
                ),
                _against(timed, SPARSE, BESIDE, "ours", f"{name} time of LoRA's", 1.0),
                _against(
                    timed,
                    SPARSE,
                    FULL,
                    FULL,
                    f"{name} time of full fine-tuning's (paper: 1/2.7 to 1/1.5)",
                    0.667,
                ),
            ]
            second.goals = [
                *training.goals(BYTES[name], ratio, f"{name} saved bytes"),
                *_own(ratio, f"{name} saved bytes", 1.20),
                _against(ratio, SPARSE, BESIDE, "ours", f"{name} saved bytes of LoRA's", 0.6),
                _against(
                    in_all,
                    SPARSE,
                    FULL,
                    FULL,
                    f"{name} bytes in all of full fine-tuning's (paper: 1/3)",
                    0.334,
                ),
            ]
        out += [table, second]
    return out


def resting(subject: Subject) -> int:
    """Bytes beside those saved for backward: weights, buffers, gradients and AdamW's moments."""
    return resident(subject) + sum(p.numel() * p.element_size() for p in subject.trained)


def _own(ratio: Ratio, what: str, limit: float) -> list[Goal]:
    return [_against(ratio, DECOMPOSED, PLAIN, "ours", f"{what} of our LoRA's", limit)]


def _against(ratio: Ratio, name: str, other: str, side: str, what: str, limit: float) -> Goal:
    return Goal(f"{name}: {what}", limit, ratio((name, "ours"), (other, side)), "x")
