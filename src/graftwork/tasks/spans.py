"""Spans in BIO tags: `B-PER I-PER O` holds one PER span of two words."""

from __future__ import annotations

from collections.abc import Sequence


def is_span_scheme(labels: Sequence[str]) -> bool:
    """Whether every label is O, B-x or I-x, and some begin a span."""
    return all(label == "O" or label[:2] in {"B-", "I-"} for label in labels) and any(
        label.startswith("B-") for label in labels
    )


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(start, end, kind) of each span. An I- without a span of its kind before it begins one, as in CoNLL."""
    found = set()
    start, kind = 0, ""
    for position, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        goes_on = mark == "I" and name == kind
        if kind and not goes_on:
            found.add((start, position, kind))
        if not goes_on:
            start, kind = position, name if mark in {"B", "I"} else ""
    return found


def span_scores(predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole spans, over all sentences; 0 where nothing is there to count."""
    right = said = true = 0
    for one, other in zip(predicted, wanted, strict=True):
        guess, gold = spans(one), spans(other)
        right, said, true = right + len(guess & gold), said + len(guess), true + len(gold)
    precision, recall = right / max(said, 1), right / max(true, 1)
    f1 = 2 * right / max(said + true, 1)
    return {"span_precision": precision, "span_recall": recall, "span_f1": f1}
