"""S2FT: the checks that a faithful implementation passes, and the toy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graftwork as gw
from graftwork.errors import BadOption
from graftwork.laws import answer, stir
from graftwork.testing import tiny, tiny_batch


def on(weight: Tensor, bias: bool = True, **options) -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype))
    model[0].weight.data = weight.clone()
    return model, next(iter(gw.attach(model, gw.S2FT(**options)).modules.values()))


def test_2_output_at_the_start_is_the_base_exactly() -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    before = answer(model, batch)
    gw.attach(model, gw.S2FT(share=0.2))
    assert torch.equal(answer(model, batch), before)


def test_3_block_gradient_is_the_slice_of_the_full_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 12, dtype=torch.float64)
    model, module = on(weight, share=0.34)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()
    full, own = weight.clone().requires_grad_(), x.detach().clone().requires_grad_()
    functional.linear(own, full, model[0].bias.detach()).square().sum().backward()
    torch.testing.assert_close(module.block.grad, full.grad[:, module.index], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, own.grad, rtol=1e-10, atol=1e-10)


def test_4_frozen_entries_keep_every_bit_with_weight_decay_on() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 12)
    model, module = on(weight, share=0.25)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 12)).square().sum().backward()
        optimizer.step()
    assert torch.equal(model[0].weight, weight)
    gw.merge(model)
    changed = (model[0].weight != weight).any(0).nonzero().flatten()
    assert torch.equal(changed, module.index)


def test_5_and_6_only_the_slice_is_kept_and_no_full_gradient_is_made() -> None:
    model, module = on(torch.randn(5, 12), share=4 / 12)
    kept: list[Tensor] = []
    x = torch.randn(2, 3, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = model(x)
    known = {p.data_ptr() for p in (*model.parameters(), module.index)}
    sizes = [t.untyped_storage().nbytes() // 4 for t in kept if t.data_ptr() not in known]
    assert sizes == [24], "2 x 3 tokens of 4 channels, as storage"
    loss.sum().backward()
    assert model[0].weight.grad is None
    assert module.block.grad.shape == (5, 4)


def test_7_adamw_on_the_block_is_adamw_with_a_masked_gradient() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 12, dtype=torch.float64)
    model, module = on(weight, share=0.25)
    full = weight.clone().requires_grad_()
    options = {"lr": 0.05, "weight_decay": 0.0}
    ours, theirs = torch.optim.AdamW([module.block], **options), torch.optim.AdamW([full], **options)
    mask = torch.zeros(12, dtype=torch.float64).index_fill(0, module.index, 1.0)
    for _ in range(5):
        x = torch.randn(7, 12, dtype=torch.float64)
        ours.zero_grad()
        theirs.zero_grad()
        model(x).square().sum().backward()
        functional.linear(x, full, model[0].bias.detach()).square().sum().backward()
        full.grad.mul_(mask)
        ours.step()
        theirs.step()
    torch.testing.assert_close(module.effective(weight, weight), full.detach(), rtol=1e-9, atol=1e-9)


def test_8_gradients_accumulate() -> None:
    torch.manual_seed(0)
    model, module = on(torch.randn(5, 12, dtype=torch.float64), share=0.25)
    x = torch.randn(6, 12, dtype=torch.float64)
    model(x).square().sum().backward()
    whole = module.block.grad.clone()
    module.block.grad = None
    for part in x.chunk(2):
        model(part).square().sum().backward()
    torch.testing.assert_close(module.block.grad, whole)


def test_10_disjoint_adapters_add_up_and_come_off() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 12, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(12, 5, dtype=torch.float64))
    model[0].weight.data = weight.clone()
    modules = [
        next(iter(gw.attach(model, gw.S2FT(share=0.25, seed=seed), name=name).modules.values()))
        for seed, name in ((0, "a"), (1, "b"))
    ]
    for module in modules:
        module.block.data.normal_()
    x = torch.randn(4, 12, dtype=torch.float64)
    with gw.active(model, "a", "b"):
        both = model(x)
    wanted = weight + modules[0].delta() + modules[1].delta()
    torch.testing.assert_close(both, functional.linear(x, wanted, model[0].bias))
    gw.merge(model, "a", "b")
    torch.testing.assert_close(model(x), both)
    gw.unmerge(model)
    assert torch.equal(model[0].weight, weight)


def test_11_grouped_query_attention() -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    head = model.config.hidden_size // model.config.num_attention_heads
    adapter = gw.attach(model, gw.S2FT(unit=head, share=0.5, workspaces=("attention.output",)))
    stir(adapter)
    assert torch.isfinite(answer(model, batch)).all()
    for module in adapter.modules.values():
        assert torch.equal(module.index.view(-1, head)[:, 0] % head, torch.zeros(len(module.index) // head))


def test_toy_block_step() -> None:
    down = torch.tensor([[1.0, 2, 3], [0, 1, -1]], dtype=torch.float64)
    model, module = on(down, bias=False, share=1 / 3, selection="weight", keep="largest")
    assert module.index.tolist() == [2]
    h = torch.tensor([[3.0, 4, 6]], dtype=torch.float64)
    y = model(h)
    assert y.tolist() == [[29.0, -2.0]]
    y.sum().backward()
    assert module.block.grad.tolist() == [[6.0], [6.0]]
    torch.optim.SGD([module.block], lr=0.01).step()
    wanted = torch.tensor([[1, 2, 2.94], [0, 1, -1.06]], dtype=torch.float64)
    torch.testing.assert_close(module.effective(down, down), wanted)


def test_units_must_divide_the_width() -> None:
    with pytest.raises(BadOption, match="does not divide the 12 inputs"):
        on(torch.ones(5, 12), unit=5)
