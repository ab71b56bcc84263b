"""A data set in memory: named columns of equal length, and where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.errors import BadData, nearest


@dataclass(frozen=True)
class Rows:
    """An immutable table.

    Args:
        columns: column name -> values; all of one length.
        origin: file, folder or name it was read from, for messages.
    """

    columns: Mapping[str, Sequence[Any]]
    origin: str = "rows"

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise BadData(f"{self.origin}: columns differ in length: {lengths}")

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], origin: str = "rows") -> Rows:
        """From a list of records that all have the same keys."""
        names = list(records[0]) if records else []
        for number, record in enumerate(records):
            if record.keys() != set(names):
                raise BadData(
                    f"{origin}: row {number} has columns {sorted(record)}, row 0 has {sorted(names)}"
                )
        return cls({name: [record[name] for record in records] for name in names}, origin)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> Sequence[Any]:
        """The values of one column; BadData with the nearest names when there is none."""
        if name not in self.columns:
            raise BadData(f"{self.origin} has no column {name!r}. {nearest(name, self.columns)}")
        return self.columns[name]

    def get(self, name: str) -> Sequence[Any] | None:
        """The values of a column that need not exist."""
        return self.columns.get(name)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.row(number) for number in range(len(self)))

    def row(self, number: int) -> dict[str, Any]:
        return {name: values[number] for name, values in self.columns.items()}

    def select(self, numbers: Sequence[int]) -> Rows:
        """The rows with these numbers, in this order."""
        return Rows({name: [v[i] for i in numbers] for name, v in self.columns.items()}, self.origin)

    def head(self, count: int) -> Rows:
        return self.select(range(min(count, len(self))))

    def pick(self, wanted: Mapping[str, str]) -> Rows:
        """Only these columns, renamed: `{"text": "sentence"}` takes `sentence` and calls it `text`."""
        return Rows({name: self[source] for name, source in wanted.items()}, self.origin)


@dataclass(frozen=True)
class Splits:
    """What a run trains on, chooses by, and reports. Validation and test may be absent."""

    train: Rows
    validation: Rows | None = None
    test: Rows | None = None
