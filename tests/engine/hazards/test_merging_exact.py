"""Merging: computed in fp32, told what rounding cost, undone bit for bit; tied weights are never changed
unasked."""

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.errors import NotMergeable, StateError

from .kit import PROJECTIONS, batch, grafted, llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_every_bit(dtype):
    model = llama().to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    grafted(model, [gw.LoRA(rank=2, workspaces=PROJECTIONS), gw.IA3()])
    attached = model(**batch()).logits
    for _ in range(3):
        report = gw.merge(model)
        assert report.rounding <= {torch.float32: 1e-5}.get(dtype, 1.0)
        merged = model(**batch()).logits
        gw.unmerge(model)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(merged, attached, atol=tolerance, rtol=tolerance)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())


def test_the_merged_weight_is_the_rounded_fp32_sum():
    model = llama().to(torch.bfloat16)
    adapter = grafted(model, gw.LoRA(rank=2, workspaces=("attention.query",)))
    site = next(iter(adapter.sites.values()))
    module = model.get_submodule(site.module)
    graft = adapter.modules[0, site.key]
    wanted = (module.weight.float() + graft.scale * graft.up @ graft.down).to(torch.bfloat16)
    gw.merge(model)
    assert torch.equal(module.weight, wanted)


@pytest.mark.parametrize("end", ["embedding", "lm_head"])
def test_tied_ends_are_refused_or_split(end):
    model = llama(tie_word_embeddings=True)
    grafted(model, gw.LoRA(rank=2, workspaces=(end,)))
    wanted = model(**batch()).logits
    shared = model.lm_head.weight
    with pytest.raises(NotMergeable, match="same tensor"):
        gw.merge(model)
    assert model.lm_head.weight is shared
    gw.merge(model, tie="split")
    torch.testing.assert_close(model(**batch()).logits, wanted, atol=1e-5, rtol=1e-5)
    gw.unmerge(model)
    assert model.lm_head.weight is shared
    assert model.model.embed_tokens.weight is shared


def test_a_merged_adapter_does_not_count_twice_and_cannot_be_detached():
    model = llama()
    grafted(model, gw.LoRA(rank=2, workspaces=PROJECTIONS))
    gw.merge(model)
    for verb in (lambda: gw.active(model, "default"), lambda: gw.detach(model), lambda: gw.merge(model)):
        with pytest.raises(StateError):
            verb()


def test_an_infinite_merge_changes_nothing():
    model = llama().to(torch.float16)
    adapter = grafted(model, gw.LoRA(rank=2, workspaces=("attention.query", "attention.value")))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    next(iter(adapter.parameters())).data.fill_(float("inf"))
    with pytest.raises(NotMergeable, match="nothing was changed"):
        gw.merge(model)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items() if "grafts" not in key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_pairs_are_added_as_the_dense_definition_says(init, dtype):
    """Several thin adapters on one weight, one of them with a pair taken out of it, in rows of several chunks."""
    model = nn.Sequential(nn.Linear(700, 600)).to(dtype)
    bare = model[0].weight.detach().double()
    first = grafted(model, gw.LoRA(rank=2, workspaces=("re:0",), init=init), "first")
    second = grafted(model, gw.LoRA(rank=3, workspaces=("re:0",)), "second", seed=4)
    deltas = [next(iter(adapter.modules.values())).delta().detach().double() for adapter in (first, second)]
    report = gw.merge(model, "first", "second")
    exact = bare + sum(deltas)
    assert report.weights == 1
    kept = model[0].weight.detach().double()
    torch.testing.assert_close(kept, exact, rtol=1e-5 if dtype == torch.float32 else 4e-3, atol=1e-6)
    lost = float((kept - exact).norm() / sum(deltas).norm()) if dtype != torch.float32 else 0.0
    assert report.rounding == pytest.approx(lost, rel=1e-2, abs=1e-12)
    gw.unmerge(model)
    assert torch.equal(model[0].weight.detach().double(), bare)


def test_a_refusal_halfway_puts_back_what_is_written():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 4)
    grafted(model, gw.SSF(workspaces=("re:0", "re:1")))
    attached = model(x)
    with pytest.raises(NotMergeable, match="no bias to take the shift"):
        gw.merge(model)
    assert torch.equal(model(x), attached)
    gw.detach(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
