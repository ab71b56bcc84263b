"""The measuring itself, against cases that can be counted by hand."""

from __future__ import annotations

import pytest
import torch

from graftwork.bench.measure import Times, interleaved, peak_rise

pytestmark = pytest.mark.slow


def test_turns_go_forth_and_back_and_the_warmup_does_not_count() -> None:
    order: list[str] = []
    actions = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(actions, 2, warmup=1)
    assert "".join(order) == "cba" + "abc" + "cba"
    assert [len(time.rounds) for time in times.values()] == [2, 2, 2]


def test_a_ratio_is_taken_within_the_round() -> None:
    """A load that doubles every time in one round leaves the ratio alone, though it moves both medians."""
    one, other = Times((1.0, 20.0, 3.0)), Times((2.0, 40.0, 6.0))
    assert one.over(other) == 0.5
    assert Times((1.0, 2.0, 3.0, 4.0, 5.0)).spread == pytest.approx(1 / 3)  # quartiles 2 and 4, median 3


def test_peak_counts_what_is_alive_at_once() -> None:
    size = 1 << 20

    def chain() -> None:
        a = torch.zeros(size)
        b = a + a
        del a
        c = b * b  # the highest point: two at a time
        del b
        torch.neg(c, out=c)

    assert peak_rise(chain) == pytest.approx(2 * 4 * size, rel=1e-3)
