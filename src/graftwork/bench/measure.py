"""Measuring: turns taken in rounds, ratios within a round, bytes at the highest point."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

Action = Callable[[], object]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Times:
    """Seconds of one action, round by round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.rounds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    def over(self, other: Times) -> float:
        """The median of the ratios within each round, which a change of the machine's load hardly moves."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def interleaved(
    actions: Mapping[K, Action], rounds: int, *, device: str = "cpu", warmup: int = 1, repeat: int = 1
) -> dict[K, Times]:
    """Each action takes one turn per round; the order turns round from one round to the next.

    Args:
        actions: name -> what to time.
        rounds: how many rounds count.
        device: where the work runs; an accelerator is waited for.
        warmup: rounds before those that count.
        repeat: calls in one turn; the time is of one call.
    """
    taken: dict[K, list[float]] = {name: [] for name in actions}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(-warmup, rounds):
            order = list(actions.items())
            for name, action in order if turn % 2 == 0 else reversed(order):
                spent = _seconds(action, repeat, device)
                if turn >= 0:
                    taken[name].append(spent)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return {name: Times(tuple(values)) for name, values in taken.items()}


def once(action: Action, device: str = "cpu") -> float:
    """Seconds of one call."""
    return _seconds(action, 1, device)


def _seconds(action: Action, repeat: int, device: str) -> float:
    wait(device)
    start = time.perf_counter()
    for _ in range(repeat):
        action()
    wait(device)
    return (time.perf_counter() - start) / repeat


def wait(device: str) -> None:
    """Until the accelerator has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_rise(action: Action, device: str = "cpu") -> int:
    """Bytes of tensor memory at the highest point of the action, above what was there before it."""
    gc.collect()
    return _cuda_rise(action) if device.startswith("cuda") else _cpu_rise(action)


def _cuda_rise(action: Action) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_rise(action: Action) -> int:
    """Summed from the profiler's record of every allocation and release, temporary ones inside kernels included."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        action()
    results = record.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    now = top = 0
    for _, change in changes:
        now += change
        top = max(top, now)
    return top
