"""Starts that are taken out of the weight: exact, the base untouched, written as an ordinary LoRA of twice the rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.errors import BadOption
from graftwork.initialisers import matrices
from graftwork.laws import answer, stir
from graftwork.testing import tiny, tiny_batch

TAKING = ("pissa", "olora")


def one(weight: torch.Tensor, **options) -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
    model[0].weight.data = weight.clone()
    adapter = gw.attach(model, gw.LoRA(**options))
    return model, next(iter(adapter.modules.values()))


def test_pissa_toy() -> None:
    _, module = one(torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)), rank=1, init="pissa")
    wanted = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(module.scale * module.up @ module.down, wanted)


@pytest.mark.parametrize("init", TAKING)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_factors_are_those_of_the_decomposition(init: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    _, module = one(weight, rank=3, alpha=6, init=init)
    product = module.scale * module.up @ module.down
    if init == "pissa":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        wanted = u[:, :3] * s[:3] @ v[:3]
    else:
        q, r = torch.linalg.qr(weight)
        wanted = q[:, :3] @ r[:3]
    torch.testing.assert_close(product, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("init", TAKING)
def test_the_base_keeps_every_bit_and_the_output_is_the_same(init: str) -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    before, state = answer(model, batch), {k: v.clone() for k, v in model.state_dict().items()}
    gw.attach(model, gw.LoRA(rank=2, init=init), name="a")
    gw.attach(model, gw.LoRA(rank=3, init=init), name="b")
    for names in (("a",), ("b",), ("a", "b")):
        with gw.active(model, *names):
            torch.testing.assert_close(answer(model, batch), before, rtol=1e-5, atol=1e-5)
    with gw.active(model):
        assert torch.equal(answer(model, batch), before)
    gw.detach(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("init", TAKING)
def test_what_was_taken_is_not_dropped_and_does_not_train(init: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 12, dtype=torch.float64)
    model, module = one(weight, rank=2, init=init, dropout=0.5)
    with torch.no_grad():
        module.up.zero_()
    model.train()
    x = torch.randn(5, 12, dtype=torch.float64)
    wanted = x @ (weight - module.taken_up @ module.taken_down).T
    torch.testing.assert_close(model(x), wanted)
    assert {name for name, _ in module.named_parameters()} == {"down", "up"}


@pytest.mark.parametrize("init", TAKING)
def test_peft_reads_it_as_a_lora_of_twice_the_rank(init: str, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model, batch = tiny("llama"), tiny_batch("llama")
    adapter = gw.attach(model, gw.LoRA(rank=2, alpha=4, init=init, workspaces=("attention.query",)))
    stir(adapter)
    wanted = answer(model, batch)
    gw.save(model, tmp_path / "out", format="hf-peft")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "out")
    assert theirs.peft_config["default"].r == 4
    torch.testing.assert_close(answer(theirs, batch), wanted, rtol=1e-5, atol=1e-5)


def test_a_file_brings_back_the_pair_without_decomposing(tmp_path, monkeypatch) -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    stir(gw.attach(model, gw.LoRA(rank=2, init="pissa")))
    wanted = answer(model, batch)
    gw.save(model, tmp_path / "out")
    monkeypatch.setattr(matrices, "top_singular", None)
    fresh = tiny("llama")
    gw.load(fresh, tmp_path / "out")
    torch.testing.assert_close(answer(fresh, batch), wanted, rtol=1e-6, atol=1e-6)


def test_randomised_captures_the_energy() -> None:
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(400, 300))[0], torch.linalg.qr(torch.randn(300, 300))[0]
    values = torch.arange(1, 301).float() ** -0.5
    matrix = left * values @ right.T
    u, s, _ = matrices.top_singular(matrix, 16)
    found, best = (u.T @ matrix).square().sum(), values[:16].square().sum()
    assert abs(float(found / best) - 1) < 1e-3
    assert torch.equal(s, matrices.top_singular(matrix, 16)[1])


@pytest.mark.parametrize("init", TAKING)
def test_rank_above_the_matrix_and_weights_that_are_not_finite(init: str) -> None:
    with pytest.raises(BadOption, match="at most 4 directions"):
        one(torch.ones(4, 6), rank=5, init=init)
    with pytest.raises(BadOption, match="not a number"):
        one(torch.full((4, 6), torch.nan), rank=1, init=init)
