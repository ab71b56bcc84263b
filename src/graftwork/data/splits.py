"""Train, validation and test: from explicit sources, from a source's own parts, or by a seeded draw."""

from __future__ import annotations

import random
from collections.abc import Mapping

from graftwork.data.readers import read_rows, splits_of
from graftwork.data.rows import Rows, Splits
from graftwork.data.tables import Layout
from graftwork.errors import BadData


def read_splits(
    train: str,
    *,
    validation: str | None = None,
    test: str | None = None,
    hold_out: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    columns: Mapping[str, str | int] | None = None,
    layout: Layout | None = None,
) -> Splits:
    """What a run needs, from one source or several.

    A part that is not named is taken from the source of `train` where that has parts of its own (embedded
    sets, folders with `train.*` and `dev.*`, npz files). Without any validation rows, the share `hold_out` of
    the training rows, drawn by `seed`, is kept aside. `limit` takes at most so many rows of each part.
    """
    own = splits_of(train)
    read = {"columns": columns, "layout": layout}
    parts = {
        "train": read_rows(train, split="train" if own else None, **read),  # type: ignore[arg-type]
        "validation": _part(validation, train, "validation", own, read),
        "test": _part(test, train, "test", own, read),
    }
    if parts["validation"] is None and hold_out > 0:
        parts["train"], parts["validation"] = held_out(_rows(parts["train"]), hold_out, seed)
    drawn = {name: rows and draw(rows, limit, seed) for name, rows in parts.items()}
    return Splits(_rows(drawn["train"]), drawn["validation"], drawn["test"])


def held_out(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Two disjoint parts that cover all rows, the second of about `share`; each keeps at least one row."""
    if len(rows) < 2:
        raise BadData(f"{rows.origin}: {len(rows)} row(s) cannot be split; name a validation source")
    count = min(max(round(len(rows) * share), 1), len(rows) - 1)
    aside = set(random.Random(seed).sample(range(len(rows)), count))
    return (
        rows.select([n for n in range(len(rows)) if n not in aside]),
        rows.select(sorted(aside)),
    )


def draw(rows: Rows, limit: int | None, seed: int) -> Rows:
    """At most `limit` rows, a seeded sample in the original order."""
    if limit is None or len(rows) <= limit:
        return rows
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), limit)))


def _part(
    source: str | None, train: str, split: str, own: tuple[str, ...], read: Mapping[str, object]
) -> Rows | None:
    if source is None:
        return read_rows(train, split=split, **read) if split in own else None  # type: ignore[arg-type]
    return read_rows(source, split=split if split in splits_of(source) else None, **read)  # type: ignore[arg-type]


def _rows(rows: Rows | None) -> Rows:
    assert rows is not None
    return rows
