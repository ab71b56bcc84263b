"""The tiny models that tests of the project and its users stand on."""

import pytest
import torch
from hosts import ALL, host

from graftwork.errors import UnknownName
from graftwork.testing import tiny, tiny_batch


@pytest.mark.parametrize("name", ALL)
def test_every_family_runs_and_its_outputs_depend_on_the_input(name):
    model = host(name)
    with torch.no_grad():
        one, other = (model(**tiny_batch(name, seed=seed))[0] for seed in (0, 1))
    assert torch.isfinite(one).all()
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bert", "mamba", "resnet"])
def test_models_are_the_same_every_time_and_leave_the_random_state(name):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second = tiny(name), tiny(name)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not first.training


def test_padding():
    assert tiny_batch("bert")["attention_mask"][0].tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert tiny_batch("llama")["attention_mask"][0].tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert "attention_mask" not in tiny_batch("llama", padding=False)
    assert tiny_batch("bert-multiple-choice")["input_ids"].shape == (3, 2, 7)
    assert set(tiny_batch("t5")) == {"input_ids", "attention_mask", "decoder_input_ids"}


MISSPELT = {
    "brt": "Did you mean bert",
    "bert-clasification": "has no task",
    "mamba-question-answering": "transformers has no",
}


@pytest.mark.parametrize("name, part", MISSPELT.items())
def test_names_that_do_not_exist(name, part):
    with pytest.raises(UnknownName, match=part):
        tiny(name)
