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


class Scored(nn.Module):
    """A linear layer with a loss."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.layer.weight.data = weight.clone()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return (self.layer(x) - labels).square().sum()


@pytest.mark.parametrize("keep", ["largest", "smallest"])
@pytest.mark.parametrize("unit", [1, 3])
@pytest.mark.parametrize("selection", ["weight", "activation", "product", "gradient"])
def test_selection_is_by_the_norm_of_each_unit(selection: str, unit: int, keep: str) -> None:
    torch.manual_seed(1)
    weight, x, y = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 12), (20, 12), (20, 5)))
    x = x * torch.rand(12, dtype=torch.float64)
    gradient = 2 * (x @ weight.T - y).T @ x
    squares = {
        "weight": weight.square().sum(0).view(-1, unit).sum(1),
        "activation": x.square().sum(0).view(-1, unit).sum(1),
        "gradient": gradient.square().sum(0).view(-1, unit).sum(1),
    }
    squares["product"] = squares["weight"] * squares["activation"]
    batches = [{"x": a, "labels": b} for a, b in zip(x.split(7), y.split(7), strict=True)]
    technique = gw.S2FT(share=0.25, unit=unit, selection=selection, keep=keep, workspaces=("linear",))
    adapter = gw.attach(Scored(weight), technique, calibration=batches if technique.needs_data else None)
    found = next(iter(adapter.modules.values())).index
    count = round(0.25 * 12 / unit)
    wanted = squares[selection].topk(count, largest=keep == "largest").indices.sort().values * unit
    assert torch.equal(found[::unit], wanted)


def permuted(model: nn.Module, order: Tensor) -> nn.Module:
    """The feed-forward channels of every layer in another order: rows of gate and up, columns of down."""
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            getattr(layer.mlp, name).weight.data = getattr(layer.mlp, name).weight.data[order].clone()
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, order].clone()
    return model


def test_1_gathering_by_index_is_co_permuting() -> None:
    """The paper's form, chosen channels side by side at the front, answers and learns as the gathered one."""
    batch, where = tiny_batch("llama"), ("feedforward.down",)
    plain, moved = tiny("llama"), tiny("llama")
    ours = gw.attach(plain, gw.S2FT(share=0.25, workspaces=where))
    channels = next(iter(ours.modules.values())).width
    chosen = next(iter(ours.modules.values())).index
    for module in ours.modules.values():
        module.index.copy_(chosen)
    order = torch.cat([chosen, torch.tensor([c for c in range(channels) if c not in chosen])])
    before = answer(tiny("llama"), batch)
    torch.testing.assert_close(answer(permuted(moved, order), batch), before, rtol=1e-5, atol=1e-5)
    theirs = gw.attach(moved, gw.S2FT(share=0.25, workspaces=where))
    for module in theirs.modules.values():
        module.index.copy_(torch.arange(len(chosen)))
    for adapter, model in ((ours, plain), (theirs, moved)):
        stir(adapter)
        answer(model, batch).square().mean().backward()
    torch.testing.assert_close(answer(plain, batch), answer(moved, batch), rtol=1e-4, atol=1e-4)
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5)


def test_1_permuting_one_side_alone_changes_the_output() -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    before, order = answer(model, batch), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, order].clone()
    assert not torch.allclose(answer(model, batch), before, rtol=1e-2, atol=1e-2)


def test_9_the_trained_model_needs_no_inverse_permutation() -> None:
    """Merged, it is the base but for the chosen columns, in the base's own order."""
    model, batch = tiny("llama"), tiny_batch("llama")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = gw.attach(model, gw.S2FT(share=0.25, workspaces=("feedforward.down",)))
    stir(adapter)
    wanted, chosen = answer(model, batch), {p.site.module: p.graft.module.index for p in adapter.placed}
    gw.merge(model)
    torch.testing.assert_close(answer(model, batch), wanted, rtol=1e-5, atol=1e-5)
    for key, value in state.items():
        changed = (model.state_dict()[key] != value).reshape(-1, value.shape[-1]).any(0).nonzero().flatten()
        assert torch.equal(changed, chosen.get(key.removesuffix(".weight"), changed[:0]))
