"""A bar on the terminal for work that takes a while; nothing where nobody watches, or where it is done soon."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
_PATIENCE = 2.0  # seconds until a bar appears


def watched(items: Iterable[T], title: str) -> Iterator[T]:
    """The items, counted on stderr; only in a run's first process."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    begun = time.monotonic()
    bar = Progress(console=Console(stderr=True), transient=True)
    line = bar.add_task(title, total=len(items) if isinstance(items, Sized) else None)
    try:
        for item in items:
            yield item
            bar.advance(line)
            if time.monotonic() - begun > _PATIENCE:
                bar.start()  # once started, this does nothing
    finally:
        bar.stop()
