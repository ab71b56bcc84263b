"""Pains of targets: what is asked for is what is adapted, and the rest is said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.errors import NothingMatches, StateError
from graftwork.testing import tiny, tiny_batch

from .kit import base_state, batch, grafted, llama, logits, same, stirred


@pytest.mark.parametrize("stray", ["attention.quary", "nope", "ssm.in", r"re:.*\.q_porj"])
def test_pain_01_a_name_that_matches_nothing_is_refused_beside_one_that_does(stray: str) -> None:
    model = llama()
    with pytest.raises(NothingMatches, match=stray.split(".")[-1].replace("*", "")[-4:]):
        gw.attach(model, gw.LoRA(rank=2, workspaces=["attention.query", stray]))
    assert not gw.adapters(model)


def test_pain_01_the_refusal_names_the_nearest_real_place() -> None:
    with pytest.raises(NothingMatches, match=r"Did you mean .*attention\.query"):
        gw.attach(llama(), gw.LoRA(rank=2, workspaces=["attention.quary"]))


def test_pain_01_a_place_that_cannot_take_the_technique_is_refused_beside_one_that_can() -> None:
    with pytest.raises(NothingMatches, match="norm"):
        gw.attach(llama(), gw.LoRA(rank=2, workspaces=["attention.query", "norm"]))
    with pytest.raises(NothingMatches, match="attention"):
        gw.attach(llama(), gw.NormTuning(workspaces=["norm", "attention.query"]))


def test_pain_01_a_name_that_may_be_missing_is_marked_so() -> None:
    adapter = gw.attach(llama(), gw.LoRA(rank=2, workspaces=["attention.query", "ssm.in?", "norm?"]))
    assert {site.workspace for site in adapter.sites.values()} == {"attention.query"}


def test_pain_01_a_table_says_before_training_what_was_reached() -> None:
    model = llama()
    whole = sum(p.numel() for p in model.parameters())
    adapter = gw.attach(
        model, gw.LoRA(rank=2, workspaces=["attention.query", "feedforward.down"], layers=(1,))
    )
    rows = [line.split() for line in adapter.summary().splitlines()]
    assert ["lora", "attention.query", "1", "1", "of", "2", f"{2 * (32 + 32)}", "512", "B"] in rows
    assert ["lora", "feedforward.down", "1", "1", "of", "2", f"{2 * (64 + 32)}", "768", "B"] in rows
    assert f"{320 / whole:.3%} of the host's" in adapter.summary()


def test_pain_02_the_second_adapter_is_matched_as_strictly_as_the_first() -> None:
    model = llama()
    grafted(model, gw.LoRA(rank=2, workspaces=["attention.query"]), "one")
    before = logits(model, batch())
    with pytest.raises(NothingMatches):
        gw.attach(model, gw.LoRA(rank=2, workspaces=["attention.quary"]), name="two")
    assert list(gw.adapters(model)) == ["one"]
    assert torch.equal(logits(model, batch()), before)


def test_pain_02_what_an_earlier_adapter_took_is_there_for_the_next() -> None:
    model = llama()
    first = gw.attach(model, gw.LoRA(rank=2, workspaces=["all-linear"]), name="one")
    second = gw.attach(model, gw.LoRA(rank=2, workspaces=["all-linear"]), name="two")
    assert first.sites.keys() == second.sites.keys()


def test_pain_05_a_workspace_is_matched_whole_never_by_its_ending() -> None:
    model = llama()
    norms = {name: module for name, module in model.named_modules() if name.endswith("norm")}
    assert len(norms) == 5  # two in each layer, and model.norm, of which a suffix "norm" takes all
    adapter = gw.attach(model, gw.FineTuning(workspaces=["norm.final"]))
    assert [site.module for site in adapter.sites.values()] == ["model.norm"]
    assert adapter.count() == 32
    inside = gw.attach(llama(), gw.FineTuning(workspaces=["norm"]))
    assert {site.module.split(".")[1] for site in inside.sites.values()} == {
        "layers"
    }  # norm.final begins with it


def test_pain_05_a_pattern_of_module_names_is_matched_whole() -> None:
    adapter = gw.attach(llama(), gw.FineTuning(workspaces=[r"re:model\.norm"]))
    assert [site.module for site in adapter.sites.values()] == ["model.norm"]
    with pytest.raises(NothingMatches, match="as a whole"):
        gw.attach(llama(), gw.FineTuning(workspaces=["re:norm"]))


@pytest.mark.parametrize("name", ["lora", "head", "grafts", "shared", "down", "default", "attention"])
def test_pain_05_a_name_that_looks_like_part_of_a_tensor_comes_back(name: str, tmp_path) -> None:
    """Every tensor's owner stands in the file, so no name is taken apart to find it."""
    host = "bert-classification"
    model, inputs = tiny(host), tiny_batch(host)
    grafted(model, [gw.LoRA(rank=2), gw.Compacter()], name)
    wanted = logits(model, inputs)
    gw.save(model, tmp_path, name)
    fresh = tiny(host)
    gw.load(fresh, tmp_path, name=name)
    assert torch.equal(logits(fresh, inputs), wanted)


def test_pain_19_experts_are_reached_by_several_adapters_and_saved(tmp_path) -> None:
    model, inputs = tiny("mixtral"), tiny_batch("mixtral")
    outputs = {}
    for seed, name in enumerate(("one", "two")):
        adapter = grafted(model, gw.LoRA(rank=2, workspaces=["experts.gate_up", "experts.down"]), name, seed)
        assert adapter.tensors()["0/experts.gate_up.down"].shape == (4, 2, 32)  # an expert axis in front
        outputs[name] = logits(model, inputs)
    assert not torch.equal(outputs["one"], outputs["two"])
    gw.save(model, tmp_path, "one")
    fresh = tiny("mixtral")
    gw.load(fresh, tmp_path, name="one")
    torch.testing.assert_close(logits(fresh, inputs), outputs["one"])


def test_pain_19_a_low_rank_update_of_experts_is_the_sum_of_products() -> None:
    model = tiny("mixtral")
    before = model.model.layers[0].mlp.experts.down_proj.detach().double().clone()
    adapter = grafted(model, gw.LoRA(rank=2, alpha=4, workspaces=["experts.down"]))
    down, up = (adapter.tensors()[f"0/experts.down.{part}"].double() for part in ("down", "up"))
    gw.merge(model)
    wanted = before + 2.0 * torch.einsum("eor,eri->eoi", up, down)
    torch.testing.assert_close(
        model.model.layers[0].mlp.experts.down_proj.double(), wanted, rtol=1e-5, atol=1e-6
    )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x + self.self_attn(x, x, x, need_weights=False)[0])


def test_pain_24_an_output_projection_that_torch_only_reads_is_adapted_and_trains() -> None:
    model, x = Block().eval(), torch.randn(2, 5, 16)
    before = model(x)
    adapter = gw.attach(model, gw.LoRA(rank=2, workspaces=[r"re:self_attn\.out_proj"]))
    stirred(adapter)
    out = model(x)
    assert not torch.allclose(out, before)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    host = model.self_attn.out_proj.weight
    module = next(iter(adapter.modules.values()))
    state = base_state(model)
    gw.detach(model)
    model.self_attn.out_proj.weight.data += module.delta().detach()
    torch.testing.assert_close(model(x), out, rtol=1e-5, atol=1e-6)
    assert host.shape == state["self_attn.out_proj.weight"].shape


class Idle(nn.Module):
    """Has a layer that its forward never comes by."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_pain_24_a_module_that_no_forward_comes_by_is_an_error_in_the_first_one() -> None:
    model = Idle()
    gw.attach(model, gw.LoRA(rank=2, workspaces=["re:(un)?used"]))
    with pytest.raises(StateError, match="unused"):
        model(torch.randn(2, 8))


def test_pain_next_bias_where_there_is_none_and_embeddings_are_not_dropped() -> None:
    with pytest.raises(NothingMatches, match="bitfit"):
        gw.attach(llama(), gw.BitFit())  # a Llama has no bias to train
    model = llama()
    adapter = gw.attach(model, gw.LoRA(rank=2, workspaces=["embedding", "attention.query"]))
    assert "embedding" in adapter.sites
    stirred(adapter)
    logits_now = model(**batch()).logits
    logits_now.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())


class Stranger(nn.Module):
    """An architecture that no table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleDict({"mix": nn.Linear(8, 8), "out": nn.Linear(8, 8)}) for _ in range(3)
        )
        self.tail = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = x + stage["out"](torch.tanh(stage["mix"](x)))
        return self.tail(x)


def test_pain_next_an_architecture_without_a_table_is_adapted_all_the_same(tmp_path) -> None:
    torch.manual_seed(3)
    model, x = Stranger(), torch.randn(2, 8)
    state = base_state(model)
    adapter = grafted(model, gw.LoRA(rank=2, workspaces=["*"]))
    assert len(adapter.placed) >= 6
    wanted = model(x).detach()
    gw.save(model, tmp_path)
    fresh = Stranger()
    fresh.load_state_dict(state)
    gw.load(fresh, tmp_path)
    torch.testing.assert_close(fresh(x), wanted)


def test_pain_next_a_table_says_which_tower_trains() -> None:
    adapter = gw.attach(tiny("clip"), gw.LoRA(rank=2, workspaces=["text.attention.query"]))
    assert "text.attention.query" in adapter.summary()
    assert "vision" not in adapter.summary()
    both = gw.attach(tiny("clip"), gw.LoRA(rank=2))
    assert "vision.attention.query" in both.summary()


def test_pain_next_no_class_of_torch_or_transformers_is_patched() -> None:
    from transformers.models.llama import modeling_llama

    kinds = [nn.Linear, nn.Module, *(v for v in vars(modeling_llama).values() if isinstance(v, type))]
    before = [dict(vars(kind)) for kind in kinds]
    names = dict(vars(modeling_llama))
    model = llama()
    for number, technique in enumerate(
        (gw.LoRA(rank=2), gw.PrefixTuning(length=2), gw.PromptTuning(length=2))
    ):
        grafted(model, technique, f"a{number}")
        logits(model, batch())
    assert [dict(vars(kind)) for kind in kinds] == before
    assert dict(vars(modeling_llama)) == names
    untouched = llama()
    assert same(base_state(untouched), base_state(model))
    assert type(untouched) is modeling_llama.LlamaForCausalLM
