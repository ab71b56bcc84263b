"""Metrics against the note's example and by hand."""

from __future__ import annotations

import pytest

from graftwork.continual import average_accuracy, backward_transfer, forgetting, incremental_accuracy
from graftwork.errors import BadOption

ROWS = [[90], [80, 85], [70, 82, 88]]


def test_check_7_metrics():
    assert average_accuracy(ROWS) == pytest.approx(80.0)
    assert forgetting(ROWS) == pytest.approx(11.5)
    assert backward_transfer(ROWS) == pytest.approx(-11.5)


def test_the_two_conventions_differ_where_a_task_ends_better():
    rows = [[50], [60, 85], [70, 82, 88]]
    assert forgetting(rows) == pytest.approx((60 - 70 + 85 - 82) / 2)
    assert forgetting(rows, "ever") == pytest.approx((0 + 85 - 82) / 2)


def test_incremental_accuracy_is_another_number():
    assert incremental_accuracy(ROWS) == pytest.approx((90 + 82.5 + 80) / 3)


def test_impossible_accuracies_are_refused():
    with pytest.raises(BadOption, match="one for each task"):
        average_accuracy([[90], [80]])
    with pytest.raises(BadOption, match="this run has one"):
        forgetting([[90]])
