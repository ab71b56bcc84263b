"""Span corruption: input and target together are the text."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.models.spans import continued, corrupt

SENTINELS = list(range(1000, 1032))


def _restored(source, target):
    """Put what the target says behind each sentinel in its place."""
    hidden, current = {}, None
    for token in target:
        if token >= 1000:
            current = hidden[token] = []
        else:
            current.append(token)
    return [t for token in source for t in (hidden[token] if token >= 1000 else [token])]


@settings(max_examples=80, deadline=None)
@given(length=st.integers(2, 300), seed=st.integers(0, 100), share=st.floats(0.05, 0.6), mean=st.floats(1, 6))
def test_nothing_is_lost_and_sentinels_come_in_order(length, seed, share, mean):
    tokens = [random.Random(seed).randrange(1000) for _ in range(length)]
    source, target = corrupt(tokens, SENTINELS, random.Random(seed), share=share, mean_span=mean)
    assert _restored(source, target) == tokens
    used = [token for token in source if token >= 1000]
    assert used == SENTINELS[: len(used)] == [token for token in target if token >= 1000]


def test_shares_are_those_of_the_paper():
    source, target = corrupt(list(range(512)), SENTINELS, random.Random(0))
    spans = sum(token >= 1000 for token in target)
    assert len(target) - spans == round(0.15 * 512)
    assert spans == round(0.15 * 512 / 3)
    assert len(source) == 512 - round(0.15 * 512) + spans


@settings(max_examples=40, deadline=None)
@given(length=st.integers(2, 300), seed=st.integers(0, 100))
def test_continuations_join_to_the_text(length, seed):
    tokens = list(range(length))
    source, target = continued(tokens, SENTINELS, random.Random(seed))
    assert source[-1] == target[0] == SENTINELS[0]
    assert source[:-1] + target[1:] == tokens
    assert len(source) > 1
    assert len(target) > 1
