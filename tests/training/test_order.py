"""Batches of like length: every sample once an epoch, less padding, the same order after an interruption."""

import random
from pathlib import Path

import pytest
import torch
from tiny_runs import recipe_values

from graftwork.errors import BadRecipe
from graftwork.tasks.base import Encoded
from graftwork.training.order import ByLength, lengths
from graftwork.training.recipe import Recipe
from graftwork.training.run import tune

pytestmark = pytest.mark.slow

DRAW = random.Random(3)
LENGTHS = [DRAW.randrange(3, 60) for _ in range(4107)]


def padded(order: list[int], size: int) -> int:
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return sum(len(batch) * max(LENGTHS[n] for n in batch) for batch in batches)


def test_every_sample_once_in_a_new_order_each_epoch() -> None:
    sampler = ByLength(LENGTHS, 32, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(len(LENGTHS)))
    assert first != second
    again = ByLength(LENGTHS, 32, seed=1)
    again.set_epoch(1)
    assert list(again) == second
    assert list(ByLength(LENGTHS, 32, seed=2)) != first


def test_hardly_any_padding_is_left() -> None:
    real = sum(LENGTHS)
    assert padded(list(range(len(LENGTHS))), 32) > 1.7 * real
    assert padded(list(ByLength(LENGTHS, 32, seed=0)), 32) < 1.05 * real


def test_lengths_do_not_come_in_ascending_order() -> None:
    order = list(ByLength(LENGTHS, 32, seed=0))
    means = torch.tensor([sum(LENGTHS[n] for n in order[s : s + 32]) / 32 for s in range(0, 4096, 32)])
    steps = torch.arange(len(means), dtype=torch.float)
    assert torch.corrcoef(torch.stack([steps, means]))[0, 1].abs() < 0.3


def test_what_has_no_tokens_has_no_length() -> None:
    assert lengths(Encoded([{"input_ids": [1, 2]}, {"input_ids": [3]}])) == [2, 1]
    with pytest.raises(BadRecipe, match=r"training\.order"):
        lengths(Encoded([{"pixel_values": [0.0]}]))


def test_an_interrupted_run_goes_on_in_the_same_order(stage: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(record, total) -> None:
        if record["step"] >= 5 and "loss" in record:
            raise Stop

    whole = Recipe.of(recipe_values(stage, tmp_path / "whole", order="length"))
    cut = Recipe.of(recipe_values(stage, tmp_path / "cut", order="length"))
    expected = tune(whole)
    with pytest.raises(Stop):
        tune(cut, watch=stop)
    assert tune(cut).scores == expected.scores
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / n / "adapter" / "default.safetensors") for n in ("whole", "cut"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
