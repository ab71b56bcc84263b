"""The study of continual learning: its verdict, its draws, its arms."""

from __future__ import annotations

import re

import pytest
import torch

from graftwork.continual import Samples, by_classes
from graftwork.data.rows import Rows
from graftwork.studies.cells import Cell
from graftwork.studies.papers import continual
from graftwork.studies.papers.continual import L2L, L2P, METHODS, S_LORA, S_PROMPTS, Material, Plan
from graftwork.testing import tiny


def cells(arm: str, values: list[float]) -> list[Cell]:
    return [
        Cell(
            arm=arm,
            task="made up",
            seed=seed,
            given={},
            figures={"average": value},
            curves={},
            seconds=0.0,
            machine="",
            versions={},
        )
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("loras", "prompts", "words"),
    [
        ([0.80, 0.81, 0.82], [0.50, 0.51, 0.52], "The finding appeared: in all 2"),
        ([0.50, 0.51, 0.52], [0.80, 0.81, 0.82], "did not appear: of 2 .* clearly below in 2"),
        ([0.50, 0.90, 0.52], [0.80, 0.51, 0.82], "did not appear: of 2 .* not told apart in 2"),
    ],
)
def test_the_verdict_on_continual_learning_follows_the_figures(loras, prompts, words):
    values = {S_LORA: loras, L2L: loras, S_PROMPTS: prompts, L2P: prompts}
    said = continual.verdict({"made up": {arm: cells(arm, each) for arm, each in values.items()}})
    assert re.search(words, said)


def test_a_part_of_the_comparisons_is_called_a_part():
    high, low = [0.80, 0.81, 0.82], [0.50, 0.51, 0.52]
    values = {S_LORA: high, S_PROMPTS: low, L2L: low, L2P: high}
    said = continual.verdict({"made up": {arm: cells(arm, each) for arm, each in values.items()}})
    assert "appeared in part: of 2" in said
    assert "S-LoRA less S-Prompts 30.0 ± 0.0 points, higher" in said


def test_rows_are_drawn_by_seed_and_never_twice():
    train = Rows({"text": [f"{n}" for n in range(40)], "label": ["a", "b"] * 20})
    test = Rows({"text": [f"test {n}" for n in range(10)], "label": ["a", "b"] * 5})
    plan = Plan(train=5, chosen_by=3, reported=4, epochs=1)
    one = continual._draw(train, test, ["a", "b"], plan, 0)
    assert [len(part) for part in one] == [10, 6, 8]
    assert not set(one[0]["text"]) & set(one[1]["text"])
    assert one[0]["text"] == continual._draw(train, test, ["a", "b"], plan, 0)[0]["text"]
    assert one[0]["text"] != continual._draw(train, test, ["a", "b"], plan, 1)[0]["text"]


@pytest.mark.parametrize("arm", METHODS)
def test_each_arm_learns_in_a_short_run(arm, monkeypatch):
    monkeypatch.setattr(continual, "load_base", lambda name: (tiny("vit-base"), None))
    labels = torch.arange(4).repeat_interleave(6)
    samples = Samples({"pixel_values": torch.randn(24, 3, 16, 16)}, labels)
    material = Material("made up", "vit", "first", by_classes(samples, samples, 2), samples)
    measured = continual.learn(arm, material, Plan(train=6, chosen_by=6, reported=6, epochs=1), 0, 1e-3)
    assert 0 <= measured.figures["average"] <= 1
    assert ("forgetting" in measured.figures) == (arm != continual.JOINT)
    assert ("identity" in measured.figures) == (arm in (S_PROMPTS, S_LORA))
