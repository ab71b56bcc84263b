"""The parts of the benchmark by name, in the order they run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from graftwork.bench.settings import Settings
from graftwork.bench.table import Table
from graftwork.errors import UnknownName, nearest

PARTS = {
    "step": "time of a training step",
    "saved": "bytes kept between forward and backward",
    "weights": "step time and saved bytes of techniques that change weights",
    "spectral": "initialising from the singular directions of a large matrix",
    "peak": "bytes at the highest point of a step",
    "mixed": "eight adapters in one batch",
    "crowd": "64 rows over 64 adapters, and tokens of two domains",
    "shelf": "a thousand registered adapters of which a batch uses 32",
    "many": "attaching and switching among 64 adapters",
    "inactive": "what an adapter costs that is switched off",
    "merge": "merging and unmerging",
    "files": "saving and loading",
    "imports": "start-up",
    "quantised": "a training step on 8-bit and 4-bit bases",
}


def part(name: str) -> Callable[[Settings], list[Table]]:
    """The measuring function of a part."""
    return importlib.import_module(f"graftwork.bench.parts.{name}").measure


def chosen(names: Sequence[str]) -> list[str]:
    """The named parts in running order, all when none is named; UnknownName for one that is none."""
    for name in names:
        if name not in PARTS:
            raise UnknownName(f"no part of the benchmark is called {name!r}. {nearest(name, PARTS)}")
    return [name for name in PARTS if not names or name in names]
