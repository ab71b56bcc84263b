"""DoRA against its definition in float64 and against peft."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.errors import BadFile
from graftwork.laws import answer, stir
from graftwork.testing import tiny, tiny_batch


def linear(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, gw.DoRA]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=bias, dtype=dtype)), gw.DoRA(rank=2, alpha=4)


def test_toy_rescales_the_rows() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False, dtype=torch.float64))
    model[0].weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    adapter = gw.attach(model, gw.DoRA(rank=1, alpha=2))
    module = next(iter(adapter.modules.values()))
    module.down.data = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    module.up.data = torch.tensor([[0.5], [-1.0]], dtype=torch.float64)
    weight = model(torch.eye(2, dtype=torch.float64)).T
    wanted = torch.tensor([[2.68328157, 1.34164079], [-4.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(weight, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("bias", [True, False])
def test_answer_and_gradients_are_the_definition(bias: bool) -> None:
    model, technique = linear(bias)
    adapter = gw.attach(model, technique)
    module = next(iter(adapter.modules.values()))
    for parameter in adapter.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 3, 5, dtype=torch.float64)
    (model(x) * target).sum().backward()
    found = [x.grad, *(p.grad for p in module.parameters())]

    w, b = model[0].weight.detach(), model[0].bias
    copies = [p.detach().clone().requires_grad_() for p in (x, *module.parameters())]
    own, down, up, magnitude = copies
    v = w + technique.scale * up @ down
    effective = magnitude.unsqueeze(1) * v / v.detach().norm(dim=1, keepdim=True)
    (nn.functional.linear(own, effective, None if b is None else b.detach()) * target).sum().backward()
    for one, other in zip(found, (c.grad for c in copies), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_attaching_is_exact_identity() -> None:
    model, technique = linear(dtype=torch.float32)
    x = torch.randn(7, 6)
    before = model(x)
    gw.attach(model, technique)
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)


def test_count_is_that_of_lora_and_one_per_output() -> None:
    model, technique = linear()
    assert gw.attach(model, technique).count() == 2 * (6 + 5) + 5


def test_in_a_stack_above_another_adapter() -> None:
    model, technique = linear()
    gw.attach(model, gw.LoRA(rank=1), name="below")
    gw.attach(model, technique, name="above")
    for adapter in gw.adapters(model).values():
        for parameter in adapter.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(3, 6, dtype=torch.float64)
    for order in (("below", "above"), ("above", "below")):
        with gw.active(model, *order):
            running = model(x)
            gw.merge(model, *order)
            torch.testing.assert_close(model(x), running, rtol=1e-9, atol=1e-9)
            gw.unmerge(model)


def test_base_changed_by_hand_is_noticed() -> None:
    model, technique = linear()
    adapter = gw.attach(model, technique)
    module = next(iter(adapter.modules.values()))
    x = torch.randn(3, 6, dtype=torch.float64)
    model(x)
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    wanted = x @ module.effective(model[0].weight, model[0].weight).T + model[0].bias
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)


def test_agrees_with_peft() -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = tiny("llama").double(), tiny("llama").double()
    batch = tiny_batch("llama")
    adapter = gw.attach(ours, gw.DoRA(rank=2, alpha=4, workspaces=("attention.query",)))
    config = peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(theirs, config)
    layers = [m for m in wrapped.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A")]
    for layer, module in zip(layers, adapter.modules.values(), strict=True):
        for parameter in module.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        layer.lora_A["default"].weight.data = module.down.data.clone()
        layer.lora_B["default"].weight.data = module.up.data.clone()
        layer.lora_magnitude_vector["default"].weight.data = module.magnitude.data.clone()
    a, b = ours(**batch).logits, wrapped(**batch).logits
    torch.testing.assert_close(a, b.double(), rtol=1e-5, atol=1e-5)


def test_file_goes_to_peft_and_back(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model, batch = tiny("llama"), tiny_batch("llama")
    stir(gw.attach(model, gw.DoRA(rank=2, alpha=4, workspaces=("attention.*", "feedforward.down"))))
    wanted = answer(model, batch)
    gw.save(model, tmp_path / "out", format="hf-peft")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "out")
    torch.testing.assert_close(answer(theirs, batch), wanted, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "back")
    fresh = tiny("llama")
    loaded = gw.load(fresh, tmp_path / "back")
    assert {type(t) for t in loaded.techniques} == {gw.DoRA}
    torch.testing.assert_close(answer(fresh, batch), wanted, rtol=1e-5, atol=1e-5)


def test_peft_has_no_place_for_both_in_one(tmp_path) -> None:
    model = tiny("llama")
    gw.attach(model, [gw.DoRA(workspaces=("attention.query",)), gw.LoRA(workspaces=("attention.value",))])
    with pytest.raises(BadFile, match="DoRA or LoRA"):
        gw.save(model, tmp_path / "out", format="hf-peft")
