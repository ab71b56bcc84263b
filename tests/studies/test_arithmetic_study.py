"""The study of adapter arithmetic: its split, its measures, and a verdict that follows from the figures."""

from __future__ import annotations

import random

import pytest

from graftwork.studies.cells import Cell
from graftwork.studies.composing import halves, in_style
from graftwork.studies.papers.arithmetic import DOMAIN, HALVES, STYLE, TASKS, gain, tables, verdict


@pytest.mark.parametrize(("zeros", "ones"), [(50, 50), (30, 70), (60, 40)])
def test_halves_are_skewed_and_complete(zeros: int, ones: int) -> None:
    """The first takes 80 % of class 0, or half of all rows where that is less, and is filled with the other class."""
    labels = [0] * zeros + [1] * ones
    first, second = halves(labels, random.Random(0))
    assert sorted(first + second) == list(range(100))
    assert len(first) == 50
    assert sum(labels[n] == 0 for n in first) == min(round(0.8 * zeros), 50)


def test_what_counts_as_the_style() -> None:
    assert in_style('Lily said, "Hello!"')
    assert not in_style("Lily said hello.")


def cells(values: list[dict[str, float]]) -> list[Cell]:
    return [
        Cell(
            arm="LoRA",
            task="t",
            seed=seed,
            given={},
            figures=figures,
            curves={},
            seconds=1.0,
            machine="m",
            versions={},
        )
        for seed, figures in enumerate(values)
    ]


def style(before: float, after: float, clean: float) -> dict[str, float]:
    arms = {
        "host": (before, 10.0, 4.0),
        "adapter added": (0.9, 8.0, 5.0),
        "adapter negated": (after, 20.0, clean),
    }
    names = ("texts in the style", "style perplexity", "clean perplexity")
    return {f"{arm}: {name}": v for arm, own in arms.items() for name, v in zip(names, own, strict=True)} | {
        "weight": 0.5
    }


def found(shift: float, clean: float) -> dict[str, dict[str, list[Cell]]]:
    noise = (0.0, 0.001, 0.002)
    alone, other = (0.9, 0.5), (0.5, 0.8)
    halved = [{"first half": 0.7, "second half": 0.6, "sum of parameters": 0.7 + shift + n} for n in noise]
    pair = [
        {"A on A": alone[0], "A on B": alone[1], "B on A": other[0], "B on B": other[1], "weight": 0.5}
        | {"mixture on A": 0.7 + shift + 2 * n, "mixture on B": 0.7 + shift}
        for n in noise
    ]
    moved = [{"source classifier": 0.7, "moved to the target": 0.7 + shift + n, "weight": 0.9} for n in noise]
    unlearnt = [style(0.5 + n, 0.5 - shift, clean) for n in noise]
    return {
        HALVES: {"lora": cells(halved)},
        TASKS: {"lora": cells(pair)},
        STYLE: {"lora": cells(unlearnt)},
        DOMAIN: {"lora": cells(moved)},
    }


def test_the_verdict_follows_the_figures() -> None:
    good, bad = verdict(found(0.1, 4.1)), verdict(found(-0.1, 4.2))
    assert "LoRA's sum is clearly above its better half (+10.1 points)" in good
    assert "the mixture is clearly above the better single adapter, that of A (+10.1 points)" in good
    assert "the style goes down clearly (50% of the texts to 40%)" in good
    assert "at most 1.025 times the host's, within 3 %" in good
    assert "the moved classifier is clearly above" in good
    assert bad.count("clearly below") == 3
    assert "does not go down clearly" in bad
    assert "beyond 3 %" in bad


def test_without_stories_the_rest_is_said() -> None:
    some = {use: own for use, own in found(0.1, 4.1).items() if use != STYLE}
    assert "Unlearning" not in verdict(some)
    assert [table.title.partition(":")[0] for table in tables(some, ("A", "B"))] == [
        "Distribution generalisation",
        "Multi-tasking",
        "Domain transfer",
    ]


def test_gain_is_paired_by_seed() -> None:
    made = gain(cells([{"a": 1.0, "b": 0.5}, {"a": 3.0, "b": 2.5}, {"a": 0.0, "b": -0.5}]), "a", "b")
    assert made.spread.mean == pytest.approx(0.5)
    assert made.sign == 1
