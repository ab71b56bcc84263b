"""Search of a weight: the best is found, everything tried is kept, the model is left as it was."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graftwork as gw
from graftwork.composition import golden, grid, scored
from graftwork.errors import BadOption
from graftwork.laws import answer, stir
from graftwork.testing import tiny, tiny_batch


def test_a_grid_tries_evenly_spaced_weights() -> None:
    found = grid(lambda weight: -((weight - 0.32) ** 2), points=11)
    assert [weight for weight, _ in found.tried] == pytest.approx([number / 10 for number in range(11)])
    assert found.best == pytest.approx(0.3)
    assert found.score == pytest.approx(-(0.02**2))


@given(st.floats(-1, 2))
def test_golden_section_finds_a_single_peak(peak: float) -> None:
    seen: list[float] = []

    def score(weight: float) -> float:
        seen.append(weight)
        return -abs(weight - peak)

    found = golden(score, -1, 2, tolerance=0.01)
    assert abs(found.best - peak) <= 0.02
    assert [weight for weight, _ in found.tried] == seen
    assert len(seen) <= 2 + 2 + math.ceil(math.log(3 / 0.01) / math.log(1.618))


def test_golden_section_tries_the_ends() -> None:
    assert golden(lambda weight: weight, 0, 1).best == 1
    assert golden(lambda weight: -weight, 0, 1).best == 0


def test_equal_scores_give_the_first() -> None:
    assert grid(lambda weight: 1.0).best == 0.0


def test_a_search_over_attached_adapters() -> None:
    """Towards a known mixture, which it finds; afterwards the model has the adapters and settings that it had."""
    model, batch = tiny("llama"), tiny_batch("llama")
    for seed, name in enumerate("ab"):
        stir(gw.attach(model, gw.LoRA(rank=2), name=name), seed=seed)
    gw.combine(model, {"a": 0.3, "b": 0.7}, name="wanted")
    wanted = answer(model, batch).detach()
    gw.detach(model, "wanted")
    gw.active(model, "b")
    before = answer(model, batch)

    @torch.no_grad()
    def score(host: torch.nn.Module) -> float:
        return -float((answer(host, batch) - wanted).square().mean())

    found = grid(scored(model, lambda weight: {"a": weight, "b": 1 - weight}, score), points=11)
    assert found.best == pytest.approx(0.3)
    assert found.score == 0.0
    assert list(gw.adapters(model)) == ["a", "b"]
    assert torch.equal(answer(model, batch), before)


def test_a_failing_score_leaves_the_model() -> None:
    model = tiny("llama")
    gw.attach(model, gw.LoRA(rank=2), name="a")

    def score(host: torch.nn.Module) -> float:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        grid(scored(model, lambda weight: {"a": weight}, score))
    assert list(gw.adapters(model)) == ["a"]


def test_bad_ranges_and_scores() -> None:
    with pytest.raises(BadOption, match="range"):
        grid(lambda weight: weight, 1, 1)
    with pytest.raises(BadOption, match="points"):
        grid(lambda weight: weight, points=1)
    with pytest.raises(BadOption, match="tolerance"):
        golden(lambda weight: weight, tolerance=0)
    with pytest.raises(BadOption, match="NaN"):
        grid(lambda weight: math.nan)
