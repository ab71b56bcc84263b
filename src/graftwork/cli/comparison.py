"""Runs side by side in a table that fills while they train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from graftwork.training.journal import Watch
from graftwork.training.report import COLUMNS, rows
from graftwork.training.result import RunResult

COLUMNS_LIVE = ("", "step", "loss", "valid", "trained", "share", "test", "s/step")  # 80 characters wide


class Comparison:
    """A live table of runs: a row says how far its run is, then what it cost and brought.

    Attributes:
        results: name -> result of the runs that are done.
    """

    def __init__(self, names: Sequence[str], console: Console | None = None) -> None:
        self.results: dict[str, RunResult] = {}
        self._progress: dict[str, dict[str, str]] = {name: {} for name in names}
        self._live = Live(self._table(), console=console or Console(), refresh_per_second=4)

    def __enter__(self) -> Comparison:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def watch(self, name: str) -> Watch:
        """What to call with each record of the run called `name`."""

        def show(record: Mapping[str, float], total: int) -> None:
            cells = self._progress[name]
            cells["step"] = f"{record['step']:.0f}/{total}"
            if "loss" in record:
                cells["loss"] = f"{record['loss']:.3f}"
            if "eval_accuracy" in record:
                cells["valid"] = f"{record['eval_accuracy']:.3f}"
            self._live.update(self._table())

        return show

    def done(self, name: str, result: RunResult) -> None:
        """Put the costs and the final score of a run into its row."""
        self.results[name] = result
        final = dict(zip(COLUMNS, rows({name: result})[0], strict=True))
        final["test"] = final["score"]
        final["valid"] = f"{result.score:.3f}"
        self._progress[name].update({key: final[key] for key in COLUMNS_LIVE if key in final and key})
        self._live.update(self._table())

    def _table(self) -> Table:
        table = Table(box=None, header_style="bold")
        for column in COLUMNS_LIVE:
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for name, cells in self._progress.items():
            table.add_row(name, *(cells.get(column, "") for column in COLUMNS_LIVE[1:]))
        return table
