"""How much two texts have in common: our own small versions of ROUGE-L, BLEU and exact match.

Texts are compared in lower case, as words and single punctuation marks. There is no stemming and no
smoothing, so values differ a little from packages that do either.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from math import exp, log

_WORD = re.compile(r"\w+|[^\w\s]")
_ORDERS = 4


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks."""
    return _WORD.findall(text.lower())


def exact_match(said: str, wanted: str) -> bool:
    """Whether both consist of the same words."""
    return words(said) == words(wanted)


def rouge_l(said: str, wanted: str) -> float:
    """F1 of the longest common subsequence (Lin 2004); 1 for two empty texts."""
    one, two = words(said), words(wanted)
    if not one or not two:
        return float(one == two)
    return 2 * common_length(one, two) / (len(one) + len(two))


def common_length(one: Sequence[str], two: Sequence[str]) -> int:
    """Length of the longest common subsequence, row by row."""
    row = [0] * (len(two) + 1)
    for word in one:
        before = row
        row = [0]
        for column, other in enumerate(two):
            row.append(before[column] + 1 if word == other else max(before[column + 1], row[column]))
    return row[-1]


def bleu(said: Sequence[str], wanted: Sequence[str]) -> float:
    """Corpus BLEU with one reference (Papineni et al. 2002): geometric mean of the clipped precisions of
    1- to 4-grams, times the brevity penalty; 0 when an order has no match."""
    pairs = [(words(a), words(b)) for a, b in zip(said, wanted, strict=True)]
    logs = 0.0
    for order in range(1, _ORDERS + 1):
        hits = total = 0
        for one, two in pairs:
            mine, theirs = _grams(one, order), _grams(two, order)
            hits, total = hits + (mine & theirs).total(), total + mine.total()
        if not hits:
            return 0.0
        logs += log(hits / total) / _ORDERS
    length, reference = sum(len(one) for one, _ in pairs), sum(len(two) for _, two in pairs)
    return exp(logs + min(0.0, 1 - reference / length))


def _grams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))
