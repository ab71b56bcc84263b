"""Span corruption, the objective of T5 (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4), and its
extreme, where one span reaches to the end: the sequential denoiser of UL2 (Tay et al. 2022,
arXiv:2205.05131).

Random spans of the input are each replaced by one sentinel; the target names each sentinel and what it hides:

    input    thank <0> inviting me to <1> party
    target   <0> you for <1> your
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def corrupt(
    tokens: Sequence[int],
    sentinels: Sequence[int],
    rng: random.Random,
    *,
    share: float = 0.15,
    mean_span: float = 3.0,
) -> tuple[list[int], list[int]]:
    """(input, target) without end marks.

    About `share` of the tokens is hidden, in spans of about `mean_span` tokens.
    """
    hidden = min(max(round(len(tokens) * share), 1), len(tokens) - 1)
    spans = min(max(round(hidden / mean_span), 1), hidden, len(tokens) - hidden, len(sentinels))
    noise, kept = _cut(hidden, spans, rng), _cut(len(tokens) - hidden, spans, rng)
    source: list[int] = []
    target: list[int] = []
    start = 0
    for sentinel, keep, hide in zip(sentinels[:spans], kept, noise, strict=True):
        middle, end = start + keep, start + keep + hide
        source += [*tokens[start:middle], sentinel]
        target += [sentinel, *tokens[middle:end]]
        start = end
    return source, target


def continued(
    tokens: Sequence[int], sentinels: Sequence[int], rng: random.Random
) -> tuple[list[int], list[int]]:
    """(input, target) where the target is the rest of the text; a quarter to three quarters of it are
    given."""
    given = rng.randint(max(1, len(tokens) // 4), max(1, 3 * len(tokens) // 4))
    return [*tokens[:given], sentinels[0]], [sentinels[0], *tokens[given:]]


def _cut(total: int, parts: int, rng: random.Random) -> list[int]:
    """`parts` whole numbers from 1 that add up to `total`."""
    ends = [*sorted(rng.sample(range(1, total), parts - 1)), total]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
