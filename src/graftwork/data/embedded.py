"""Data sets that come with Python and scikit-learn: nothing is downloaded.

Every set has the parts train, validation and test (about 70, 15 and 15 %), drawn by a hash of `seed` and the
group that a row belongs to, so that the parts stay the same when rows come or go with another Python version.

- `docstrings`: every docstring: summary, body, module, name, subject (None for modules without one).
- `docstrings:subjects`: text -> label, the area of the library. A group is a top-level class or function, so
  that the methods of one class never straddle the parts: the task is to name the area of an unseen class or
  function (a linear model on word counts gets about three in four right).
- `docstrings:subjects-by-module`: the same rows, grouped by module: a test of transfer, and much harder (the
  linear model gets little more than half).
- `docstrings:text`: column text, for language modelling; the language reference's help topics are added, each
  paragraph once.
- `docstrings:retrieval`: query (the summary line) -> document (the body).
- `docstrings:summaries`: source (the body) -> target (the summary line), for sequence-to-sequence.
- `digits`, `digits:low`, `digits:high`: 8 x 8 grey images of handwritten digits 0-9, 0-4, 5-9.
- `digits:captions`: image -> caption, one of three sentences, drawn by the image's number, that name the digit. Which
  sentence it is cannot be seen, so the digit is all that a caption can get right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from graftwork.data.docstrings import Docstring, collect, help_topics
from graftwork.data.rows import Rows
from graftwork.errors import BadData

_SHARES = (("train", 0.70), ("validation", 0.85), ("test", 1.0))  # upper ends
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SENTENCES = ("This is the number {}.", "Returns {} for the image.", "The digit {} is given.")
_LEAST_BODY = 40  # characters below which a body says too little to be found or summarised


def part_of(group: str, seed: int) -> str:
    """`train`, `validation` or `test`, by a hash of the group."""
    draw = _draw(f"{seed}/{group}")
    return next(name for name, end in _SHARES if draw < end)


def _draw(text: str) -> float:
    """A number in [0, 1) by the hash of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def docstrings(split: str, *, seed: int = 0) -> Rows:
    """All docstrings of one part: summary, body, module, name, subject."""
    names = ("summary", "body", "module", "name", "subject")
    chosen = _chosen(split, seed, lambda d: d.definition)
    return _rows({name: [getattr(d, name) for d in chosen] for name in names}, "docstrings", split)


def subjects(split: str, *, seed: int = 0, by_module: bool = False) -> Rows:
    """text, label and module of docstrings whose module has a subject."""
    chosen = [d for d in _chosen(split, seed, lambda d: d.module if by_module else d.definition) if d.subject]
    columns: dict[str, list[Any]] = {
        "text": [d.text for d in chosen],
        "label": [d.subject for d in chosen],
        "module": [d.module for d in chosen],
    }
    return _rows(columns, "docstrings:subjects", split)


def text(split: str, *, seed: int = 0) -> Rows:
    """Docstrings and help topics as text for language modelling."""
    topics = [text for name, text in help_topics() if part_of(name, seed) == split]
    return _rows(
        {"text": [d.text for d in _chosen(split, seed, lambda d: d.definition)] + topics},
        "docstrings:text",
        split,
    )


def retrieval(split: str, *, seed: int = 0) -> Rows:
    """query (summary line) and document (body)."""
    chosen = _with_body(split, seed)
    columns = {"query": [d.summary for d in chosen], "document": [d.body for d in chosen]}
    return _rows(columns, "docstrings:retrieval", split)


def summaries(split: str, *, seed: int = 0) -> Rows:
    """source (body) and target (summary line)."""
    chosen = _with_body(split, seed)
    columns = {"source": [d.body for d in chosen], "target": [d.summary for d in chosen]}
    return _rows(columns, "docstrings:summaries", split)


def digits(split: str, *, seed: int = 0, classes: Sequence[int] = range(10)) -> Rows:
    """image ((8, 8) uint8, 0 to 255) and label (0 to 9) of scikit-learn's digits."""
    images, labels = _digits()
    chosen = _chosen_digits(split, seed, classes)
    columns = {"image": [images[n] for n in chosen], "label": [labels[n] for n in chosen]}
    return _rows(columns, "digits", split)


def captions(split: str, *, seed: int = 0) -> Rows:
    """image, as `digits`, and caption, a sentence that names it."""
    images, labels = _digits()
    chosen = _chosen_digits(split, seed, range(10))
    said = [SENTENCES[int(_draw(f"sentence {n}") * len(SENTENCES))].format(DIGITS[labels[n]]) for n in chosen]
    columns = {"image": [images[n] for n in chosen], "caption": said}
    return _rows(columns, "digits:captions", split)


SETS: dict[str, Callable[[str], Rows]] = {
    "docstrings": docstrings,
    "docstrings:subjects": subjects,
    "docstrings:subjects-by-module": lambda split: subjects(split, by_module=True),
    "docstrings:text": text,
    "docstrings:retrieval": retrieval,
    "docstrings:summaries": summaries,
    "digits": digits,
    "digits:low": lambda split: digits(split, classes=range(5)),
    "digits:high": lambda split: digits(split, classes=range(5, 10)),
    "digits:captions": captions,
}


def load(name: str, split: str | None) -> Rows:
    """One part of an embedded set."""
    if split is None:
        raise BadData(f"{name} has the parts train, validation and test: say which split")
    return SETS[name](split)


def _chosen_digits(split: str, seed: int, classes: Sequence[int]) -> list[int]:
    labels = _digits()[1]
    return [n for n, label in enumerate(labels) if label in classes and part_of(f"digit {n}", seed) == split]


def _chosen(split: str, seed: int, group: Callable[[Docstring], str]) -> list[Docstring]:
    return [d for d in collect() if part_of(group(d), seed) == split]


def _with_body(split: str, seed: int) -> list[Docstring]:
    chosen = _chosen(split, seed, lambda d: d.definition)
    return [d for d in chosen if len(d.body) >= _LEAST_BODY and d.summary not in d.body]


def _rows(columns: dict[str, list[Any]], name: str, split: str) -> Rows:
    return Rows(columns, f"{name}[{split}]")


@lru_cache(maxsize=1)
def _digits() -> tuple[list[Any], list[int]]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return list((found.images * (255 / 16)).round().astype("uint8")), found.target.tolist()
