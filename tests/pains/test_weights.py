"""Pains of weights: the base keeps its names and bits, merging is exact or says what it cost."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.cli.merge import compare
from graftwork.errors import BadFile, BadOption, NothingMatches, NotMergeable, PortUnavailable, StateError
from graftwork.reference.catalogue import techniques
from graftwork.testing import tiny, tiny_batch

from .kit import base_state, batch, grafted, llama, logits, same, stirred

ALL = sorted(techniques())


def attached(name: str, model: nn.Module, adapter: str = "default") -> gw.Adapter | None:
    """The technique with its defaults, None where the model cannot take it."""
    try:
        return gw.attach(model, gw.make(name, {}), name=adapter)
    except (NothingMatches, PortUnavailable, BadOption):
        return None


@pytest.mark.parametrize("name", ALL)
def test_pain_04_every_key_of_the_base_survives_and_its_checkpoint_still_loads(name: str) -> None:
    model = tiny("bert")
    checkpoint = tiny("bert", seed=5).state_dict()
    keys = list(checkpoint)
    if attached(name, model) is None:
        pytest.skip(f"bert does not take {name}")
    assert [key for key in model.state_dict() if "grafts" not in key.split(".")] == keys
    missing, surplus = model.load_state_dict(checkpoint, strict=True)
    assert not missing
    assert not surplus
    with gw.active(model):
        assert torch.equal(
            logits(model, tiny_batch("bert")), logits(tiny("bert", seed=5), tiny_batch("bert"))
        )


def test_pain_04_weights_come_onto_a_skeleton_that_has_its_adapter_already() -> None:
    """Attach on the meta device, load the base afterwards: what sharded training does."""
    with torch.device("meta"):
        model = type(llama())(llama().config)
    gw.attach(model, gw.LoRA(rank=2))
    model.load_state_dict(llama().state_dict(), strict=False, assign=True)
    base = {key: p for key, p in model.named_parameters() if "grafts" not in key.split(".")}
    assert not any(p.is_meta for p in base.values())


def test_pain_07_tied_memory_is_found_by_storage_and_never_changed_at_one_end_unasked() -> None:
    """Two parameters over one memory, which no identity of names or objects shows."""
    model = llama()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach())
    grafted(model, gw.LoRA(rank=2, workspaces=["embedding"]))
    before, wanted = base_state(model), logits(model, batch())
    with pytest.raises(NotMergeable, match=r"lm_head.*split"):
        gw.merge(model)
    assert same(base_state(model), before)
    gw.merge(model, tie="split")
    torch.testing.assert_close(logits(model, batch()), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])
    gw.unmerge(model)
    assert same(base_state(model), before)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("end", ["embedding", "lm_head"])
def test_pain_07_what_is_written_says_that_the_tie_is_split(end: str, tmp_path) -> None:
    model = llama(tie_word_embeddings=True)
    grafted(model, gw.LoRA(rank=2, workspaces=[end]))
    wanted = logits(model, batch())
    with pytest.raises(NotMergeable, match="same tensor"):
        gw.merge(model)
    gw.merge(model, tie="split")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, batch()), wanted, rtol=1e-5, atol=1e-5)
    gw.unmerge(model)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_pain_08_a_packed_base_is_not_requantised_behind_the_users_back(monkeypatch) -> None:
    from graftwork.engine import operations

    model = llama()
    grafted(model, gw.LoRA(rank=2))
    before = base_state(model)
    kind = type(operations.operation_of(type(model.model.layers[0].self_attn.q_proj)))
    monkeypatch.setattr(kind, "packed", lambda self, module: True)
    with pytest.raises(NotMergeable, match=r"quantised.*16 or 32 bit"):
        gw.merge(model)
    assert same(base_state(model), before)


def test_pain_08_merging_reports_what_rounding_cost() -> None:
    model = llama().to(torch.bfloat16)
    adapter = grafted(model, gw.LoRA(rank=2, workspaces=["attention.query"], layers=(0,)))
    host = model.model.layers[0].self_attn.q_proj
    before, delta = (
        host.weight.detach().double().clone(),
        next(iter(adapter.modules.values())).delta().detach().double(),
    )
    report = gw.merge(model)
    lost = (host.weight.detach().double() - (before + delta)).norm() / delta.norm()
    assert report.weights == 1
    assert report.rounding == pytest.approx(float(lost), rel=1e-3)
    exact = llama().double()
    grafted(exact, gw.LoRA(rank=2))
    assert gw.merge(exact).rounding < 1e-12


def test_pain_09_merging_rounds_once_and_unmerging_restores_every_bit() -> None:
    model = llama().to(torch.bfloat16)
    adapter = grafted(model, gw.LoRA(rank=2, alpha=3, workspaces=["all-linear"]), "fr")
    before, answered = base_state(model), logits(model, batch())
    deltas = {place.site.module: place.graft.module.delta().detach() for place in adapter.placed}
    gw.merge(model)
    merged = base_state(model)
    for path, delta in deltas.items():
        wanted = (before[f"{path}.weight"].float() + delta).to(torch.bfloat16)
        assert torch.equal(merged[f"{path}.weight"], wanted), path
    gw.unmerge(model)
    assert same(base_state(model), before)
    assert torch.equal(logits(model, batch()), answered)
    assert list(gw.adapters(model)) == ["fr"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_pain_16_no_technique_writes_into_the_base(name: str) -> None:
    """So switching it off is the base, and a second adapter starts from the same weights as the first."""
    model = tiny("bert")
    before, answer = base_state(model), logits(model, tiny_batch("bert"))
    first = attached(name, model, "one")
    if first is None:
        pytest.skip(f"bert does not take {name}")
    stirred(first)
    alone = grafted(model, gw.LoRA(rank=2), "two", seed=2)
    assert same(base_state(model), before)
    with gw.active(model):
        assert torch.equal(logits(model, tiny_batch("bert")), answer)
    with gw.active(model, "two"):
        second = logits(model, tiny_batch("bert"))
    other = tiny("bert")
    twin = gw.attach(other, gw.LoRA(rank=2), name="two")
    twin.load_tensors(alone.tensors())
    assert torch.equal(logits(other, tiny_batch("bert")), second)


@pytest.mark.parametrize("name", ALL)
def test_pain_21_the_model_comes_back_as_it_was(name: str) -> None:
    model = tiny("bert")
    shape = [(type(m), sorted(m.__dict__), sorted(m._modules)) for m in model.modules()]
    flags, state = [p.requires_grad for p in model.parameters()], base_state(model)
    if attached(name, model) is None:
        pytest.skip(f"bert does not take {name}")
    gw.detach(model)
    assert [(type(m), sorted(m.__dict__), sorted(m._modules)) for m in model.modules()] == shape
    assert [p.requires_grad for p in model.parameters()] == flags
    assert same(model.state_dict(), state)


def test_pain_21_attaching_twice_does_not_stack_unasked() -> None:
    model = llama()
    grafted(model, gw.LoRA(rank=2), "one", seed=1)
    with pytest.raises(StateError, match="attached already"):
        gw.attach(model, gw.LoRA(rank=2), name="one")
    grafted(model, gw.LoRA(rank=2), "two", seed=2)
    alone = llama()
    grafted(alone, gw.LoRA(rank=2), "two", seed=2)
    adapter = gw.adapters(alone)["two"]
    adapter.load_tensors(gw.adapters(model)["two"].tensors())
    assert torch.equal(
        logits(model, batch()), logits(alone, batch())
    )  # the first is attached and not running


def test_pain_21_part_of_an_attached_model_is_not_attached_to_by_itself() -> None:
    model = llama()
    gw.attach(model, gw.LoRA(rank=2))
    with pytest.raises(StateError, match="part of an attached model"):
        gw.attach(model.model, gw.LoRA(rank=2), name="inner")


@pytest.mark.parametrize("host", ["llama", "bert", "gpt2", "vit"])
def test_pain_25_the_written_merged_model_is_the_one_that_was_trained(host: str, tmp_path) -> None:
    model, inputs = tiny(host), tiny_batch(host)
    grafted(model, gw.LoRA(rank=2, workspaces=["all-linear"]), head=False)
    wanted, bare = logits(model, inputs), logits(tiny(host), inputs)
    gw.merge(model)
    model.save_pretrained(tmp_path)
    again = type(tiny(host)).from_pretrained(tmp_path).eval()
    scale = float(wanted.abs().max())
    assert float((logits(again, inputs) - wanted).abs().max()) < 1e-5 * scale
    assert float((bare - wanted).abs().max()) > 1e-2 * scale


def test_pain_25_a_merged_adapter_is_not_said_to_be_left_out(tmp_path, caplog) -> None:
    model = llama()
    grafted(model, gw.LoRA(rank=2), "fr")
    gw.merge(model)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
    assert "without its adapters" not in caplog.text


def test_pain_25_an_export_that_is_not_the_live_model_is_refused(tmp_path) -> None:
    """The self-check reads the folder again; here a weight is changed on the way to the disk."""
    model = llama()
    grafted(model, gw.LoRA(rank=2))
    gw.merge(model)
    model.save_pretrained(tmp_path)
    compare(model, tmp_path)
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] += 1e-4
    with pytest.raises(BadFile, match=r"layers\.1\.mlp\.up_proj"):
        compare(model, tmp_path)
