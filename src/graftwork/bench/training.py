"""What step, saved and peak have in common: one figure per subject, set beside floor, full and peer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from graftwork.bench import peer
from graftwork.bench.hosts import Host
from graftwork.bench.settings import Settings
from graftwork.bench.table import Cell, Goal
from graftwork.bench.variants import FLOOR, FULL, Failure, Subject, Variant, failure, subjects

Key = tuple[str, str]  # variant, side
T = TypeVar("T")


@dataclass
class Collected(Generic[T]):
    """What a probe found, subject by subject.

    Attributes:
        figures: of the subjects that could be built and probed.
        trained: how many parameters each of them trains.
        failures: the others, and why.
    """

    figures: dict[Key, T] = field(default_factory=dict)
    trained: dict[Key, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)


def collect(
    settings: Settings,
    host: Host,
    dtype: torch.dtype,
    chosen: tuple[Variant, ...],
    probe: Callable[[Subject], T],
) -> Collected[T]:
    """Build one subject after another and probe it; a failure is a note, not the end."""
    out: Collected[T] = Collected()
    for subject in subjects(host, dtype, settings.device, chosen):
        if isinstance(subject, Failure):
            out.failures.append(subject)
            continue
        key = subject.variant, subject.side
        try:
            out.figures[key] = probe(subject)
            out.trained[key] = sum(p.numel() for p in subject.trained)
        except Exception as error:  # as with building
            out.failures.append(failure(*key, error))
    return out


def stepper(subject: Subject, batch: Mapping[str, Any]) -> Callable[[], None]:
    """Forward, backward and AdamW; the floor has nothing to update."""
    trained = subject.trained
    optimiser = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        subject.model(**batch).loss.backward()
        if optimiser is not None:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    return step


Ratio = Callable[[Key, Key], float | None]


def rows(
    chosen: tuple[Variant, ...], figures: Mapping[Key, float], ratio: Ratio, more: Callable[[Key], Cell]
) -> list[tuple[Cell, ...]]:
    """One row per variant: figure, `more`, ratios to floor and full, the peer's figure, ratio to the peer."""
    floor, full = (FLOOR, FLOOR), (FULL, FULL)
    out: list[tuple[Cell, ...]] = []
    for name, side in (floor, full, *((variant.name, "ours") for variant in chosen)):
        key, other = (name, side), (name, "peer")
        own = figures.get(key)
        out.append(
            (name, own, more(key), ratio(key, floor), ratio(key, full), figures.get(other), ratio(key, other))
        )
    return out


def notes(found: Collected[Any]) -> list[str]:
    """Failures, the absent peer, and variants in which the two train different numbers of parameters."""
    out = [
        f"{f.variant}, {'graftwork' if f.side == 'ours' else peer.NAME}: {f.reason}" for f in found.failures
    ]
    if not peer.available():
        out.append(peer.ABSENT)
    for (name, side), own in found.trained.items():
        theirs = found.trained.get((name, "peer"))
        if side == "ours" and theirs is not None and theirs != own:
            out.append(f"{name}: graftwork trains {own:,} parameters, {peer.NAME} {theirs:,}")
    return out


def goals(limits: Mapping[str, float], ratio: Ratio, what: str) -> list[Goal]:
    """Each limited variant's ratio to the peer."""
    return [
        Goal(f"{name}: {what} of {peer.NAME}'s", limit, ratio((name, "ours"), (name, "peer")), "x")
        for name, limit in limits.items()
    ]


def headed(what: str, more: str) -> tuple[str, ...]:
    """Column headings for `rows`."""
    return ("variant", what, more, "/ floor", "/ full", f"{peer.NAME} {what}", f"/ {peer.NAME}")


def titled(host: Host, dtype: str, settings: Settings) -> str:
    """Host, precision of the base, device."""
    return f"{host.about}; base in {dtype}, {settings.device}"
