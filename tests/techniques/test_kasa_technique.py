"""KaSA: the checks that a faithful implementation passes, and the toys."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.errors import BadFile, BadOption
from graftwork.laws import answer, stir
from graftwork.testing import tiny, tiny_batch


def on(weight: torch.Tensor, **options) -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
    model[0].weight.data = weight.clone()
    return model, next(iter(gw.attach(model, gw.KaSA(**options)).modules.values()))


def world(model: nn.Module, width: int) -> torch.Tensor:
    """The weight that the model multiplies by at the start."""
    return model(torch.eye(width, dtype=torch.float64)).T


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_1_truncation_error_is_the_energy_of_the_smallest(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    model, _ = on(weight, rank=2)
    cut = world(model, shape[1])
    torch.testing.assert_close((weight - cut).norm(), values[-2:].square().sum().sqrt(), rtol=1e-6, atol=1e-6)
    left = torch.linalg.svdvals(cut)
    assert float(left[-2:].max()) < 1e-6
    torch.testing.assert_close(left[:-2], values[:-2], rtol=1e-6, atol=1e-6)


def test_2_output_at_the_start_is_that_of_the_truncated_base() -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    before = answer(model, batch)
    gw.attach(model, gw.KaSA(rank=2))
    assert not torch.allclose(answer(model, batch), before, atol=1e-6)
    with gw.active(model):
        assert torch.equal(answer(model, batch), before)
    gw.detach(model)
    assert torch.equal(answer(model, batch), before)


def test_3_truncation_is_idempotent() -> None:
    torch.manual_seed(0)
    first, _ = on(torch.randn(6, 5, dtype=torch.float64), rank=2)
    once = world(first, 5)
    second, _ = on(once.detach(), rank=2)
    torch.testing.assert_close(world(second, 5), once, rtol=1e-9, atol=1e-9)


def test_4_gradients_of_the_first_step() -> None:
    torch.manual_seed(0)
    model, module = on(torch.randn(6, 5, dtype=torch.float64), rank=2)
    model(torch.randn(3, 5, dtype=torch.float64)).square().sum().backward()
    assert not module.down.grad.any()
    assert not module.values.grad.any()
    assert module.up.grad.any()


def test_5_merged_is_unmerged_and_unmerge_gives_the_base_back() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 5)
    model, module = on(weight, rank=2)
    for parameter in module.parameters():
        parameter.data.normal_()
    x = torch.randn(4, 5)
    running = model(x)
    gw.merge(model)
    torch.testing.assert_close(model(x), running, rtol=1e-5, atol=1e-5)
    gw.unmerge(model)
    assert torch.equal(model[0].weight, weight)


def test_6_values_of_zero_give_the_truncated_base_and_of_one_a_lora_on_it() -> None:
    torch.manual_seed(0)
    model, module = on(torch.randn(6, 5, dtype=torch.float64), rank=2)
    cut = world(model, 5)
    module.up.data.normal_()
    module.values.data.zero_()
    torch.testing.assert_close(world(model, 5), cut)
    module.values.data.fill_(1.0)
    torch.testing.assert_close(world(model, 5), cut + module.scale * module.up @ module.down)


def test_8_count_is_that_of_lora_and_the_rank() -> None:
    model, module = on(torch.ones(6, 5), rank=2)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (6 + 5) + 2
    assert {name for name, _ in module.named_parameters()} == {"down", "up", "values"}
    count = 24 * (8 * (768 + 768) + 8)
    assert count == 295_104  # the count in the published log, RoBERTa-base, query and value


def test_9_file_on_a_fresh_base_and_a_wrong_rank_is_refused(tmp_path) -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    adapter = gw.attach(model, gw.KaSA(rank=2))
    stir(adapter)
    wanted = answer(model, batch)
    gw.save(model, tmp_path / "out")
    fresh = tiny("llama")
    gw.load(fresh, tmp_path / "out")
    torch.testing.assert_close(answer(fresh, batch), wanted, rtol=1e-6, atol=1e-6)
    other = gw.attach(tiny("llama"), gw.KaSA(rank=3))
    with pytest.raises(BadFile, match="shapes do not fit"):
        other.load_tensors(adapter.tensors())


def test_toy_diagonal() -> None:
    model, module = on(torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)), rank=1, alpha=2)
    x = torch.ones(1, 3, dtype=torch.float64)
    torch.testing.assert_close(model(x), torch.tensor([[3.0, 2.0, 0.0]], dtype=torch.float64))
    module.down.data = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    module.up.data = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    module.values.data = torch.tensor([0.5], dtype=torch.float64)
    torch.testing.assert_close(model(x), torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("truncation", "rank", "error"),
    [
        ("paper", 1, 2.236068),
        ("paper", 2, 3.741657),
        ("published-code", 1, 0.0),
        ("published-code", 2, 2.236068),
    ],
)
def test_toy_wide_matrix_in_both_readings(truncation: str, rank: int, error: float) -> None:
    weight = torch.tensor([[4.0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 2, 1]], dtype=torch.float64)
    model, _ = on(weight, rank=rank, truncation=truncation)
    assert float((weight - world(model, 4)).norm()) == pytest.approx(error, abs=1e-5)


def test_a_rank_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(BadOption, match="at most 4"):
        on(torch.ones(6, 5), rank=5)


def test_peft_reads_it_as_a_lora_of_twice_the_rank(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model, batch = tiny("llama"), tiny_batch("llama")
    stir(gw.attach(model, gw.KaSA(rank=2)))
    wanted = answer(model, batch)
    gw.save(model, tmp_path / "out", format="hf-peft")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "out")
    torch.testing.assert_close(answer(theirs, batch), wanted, rtol=1e-5, atol=1e-5)
