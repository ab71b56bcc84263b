"""A study: what a paper claims, and the measurements that show whether it holds at small size."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from graftwork.errors import BadData, BadOption
from graftwork.studies.findings import Findings
from graftwork.studies.session import Session

Size = Literal["small", "full"]
_DATA = "../shared/data"


@dataclass(frozen=True, kw_only=True)
class Study:
    """One paper's claim, measured.

    Attributes:
        name: what the command line calls it; its file in `studies/papers` has the same with underscores.
        title: one line, the page's heading.
        source: authors, year, arXiv number or venue; several are divided by semicolons.
        claim: what the paper says, as far as it can be held against figures.
        run: measures what is missing, through `Session.cell`, and says what was found. The verdict it gives is
            computed from the figures.
    """

    name: str
    title: str
    source: str
    claim: str
    run: Callable[[Session], Findings]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The choices of a run of a study.

    Attributes:
        seeds: at least one; two or more give a standard deviation.
        size: "small" fits minutes to half an hour of one CPU core; "full" is as near to the paper as the study knows.
        data: folder with data sets and weights; None where there is none, then studies use embedded data.

    Raises BadOption for seeds that are empty, negative or repeated, or an unknown size.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    size: Size = "small"
    data: Path | None = None

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) != len(self.seeds):
            raise BadOption(f"seeds={list(self.seeds)}: give at least one, each once, none below 0")
        if self.size not in get_args(Size):
            raise BadOption(f"size={self.size!r} must be one of {', '.join(get_args(Size))}")


def data_folder(given: Path | None = None) -> Path | None:
    """Where data are: the folder given, else $GRAFTWORK_DATA, else ../shared/data; None where nothing is there.

    Raises BadData for a folder that was asked for and is none.
    """
    asked = given or (Path(os.environ["GRAFTWORK_DATA"]) if os.environ.get("GRAFTWORK_DATA") else None)
    if asked is not None and not asked.is_dir():
        raise BadData(f"{asked} is no folder: give --data or GRAFTWORK_DATA a folder with data sets")
    return asked or (Path(_DATA) if Path(_DATA).is_dir() else None)
