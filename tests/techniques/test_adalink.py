"""AdaLink: the checks of its paper, against formulas, models without it and each modality alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from answers import close, logits
from torch import Tensor, nn

import graftwork as gw
from graftwork.errors import NotMergeable, StateError
from graftwork.laws import stir
from graftwork.reference.site import Kind, Site
from graftwork.testing import tiny, tiny_batch

EXAMPLE = torch.tensor([-1.0, 2.0, 0.0, 0.5])
DOWN = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, -1]])
UP = torch.tensor([[0.1, 0, 0, 0.2], [0, 0.3, -0.1, 0]]).T


def two_modalities() -> tuple[Any, dict[str, Any], Tensor]:
    """A decoder that reads three image features and five tokens a row, and which is which."""
    model = tiny("llama")
    text = model.get_input_embeddings()(tiny_batch("llama", length=5, padding=False)["input_ids"])
    embeds = torch.cat([torch.randn(3, 3, 32), text], dim=1).detach()
    index = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]).expand(3, -1)
    for seed, name in enumerate(("text", "image")):
        stir(gw.attach(model, gw.AdaLink(rank=4, workspaces=("inputs",)), name=name), seed=seed)
    return model, {"inputs_embeds": embeds}, index


def test_check_1_starts_as_the_frozen_model_bit_for_bit() -> None:
    for workspaces in (None, ("inputs",)):
        model, batch = tiny("llama"), tiny_batch("llama")
        before = logits(model, **batch)
        gw.attach(model, gw.AdaLink(rank=4, workspaces=workspaces))
        assert torch.equal(logits(model, **batch), before)


@pytest.mark.parametrize(
    ("nonlinearity", "expected"), [("none", [-1.1, 2.45, -0.15, 0.3]), ("relu", [-1.0, 2.45, -0.15, 0.5])]
)
def test_check_2_toy_vector(nonlinearity: Any, expected: list[float]) -> None:
    site = Site(key="embedding", workspace="embedding", kind=Kind.EMBEDDING, module="e", channels_out=4)
    link: Any = gw.AdaLink(rank=2, nonlinearity=nonlinearity).build(site)
    link.down.weight.data, link.up.weight.data = DOWN, UP
    close(EXAMPLE + link(EXAMPLE), torch.tensor(expected), 1e-6)


def test_check_3_count_and_gradients() -> None:
    model, batch, index = two_modalities()
    adapters = gw.adapters(model)
    assert sum(adapter.count() for adapter in adapters.values()) == 2 * (2 * 32 * 4)
    assert gw.attach(tiny("bert"), gw.AdaLink(rank=4, bias=True)).count() == 2 * 32 * 4 + 4 + 32
    gw.trainable(model, "text", "image")
    with gw.route(model, ["text", "image"], index):
        model(**batch).logits.square().mean().backward()
    with_gradient = {key for key, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {key for key, _ in model.named_parameters() if ".grafts." in key}


def test_check_4_lengths_masks_and_positions_stay() -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    seen: list[dict[str, Any]] = []
    layer = model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    logits(model, **batch)
    stir(gw.attach(model, gw.AdaLink(rank=4)))
    assert logits(model, **batch).shape[1] == batch["input_ids"].shape[1]
    hook.remove()
    for name in ("attention_mask", "position_ids"):
        assert torch.equal(seen[0][name], seen[1][name])


def test_check_5_modalities_do_not_touch_each_other() -> None:
    model, batch, index = two_modalities()
    text_only = torch.where(index == 1, -1, index)
    with gw.route(model, ["text", "image"], text_only):
        before = logits(model, **batch)
    with gw.route(model, ["text", "image"], index):
        both = logits(model, **batch)
    stir(gw.adapters(model)["image"], seed=7)
    with gw.route(model, ["text", "image"], text_only):
        assert torch.equal(logits(model, **batch), before)
    with gw.route(model, ["text", "image"], index):
        assert not torch.equal(logits(model, **batch), both)
    links = {name: next(iter(a.modules.values())) for name, a in gw.adapters(model).items()}
    e = batch["inputs_embeds"]
    linked = torch.where((index == 1)[..., None], e + links["image"](e), e + links["text"](e))
    with gw.route(model, ["text", "image"], index):
        routed = logits(model, **batch)
    gw.detach(model)
    close(routed, logits(model, inputs_embeds=linked))


@pytest.mark.parametrize("nonlinearity", ["none", "relu"])
@pytest.mark.parametrize("host", ["llama", "gemma3", "bert", "bart"])
def test_check_6_folds_into_the_table(host: str, nonlinearity: Any) -> None:
    model, batch = tiny(host, {"tie_word_embeddings": False}), tiny_batch(host)
    link = gw.attach(model, gw.AdaLink(rank=4, nonlinearity=nonlinearity, bias=True))
    stir(link)
    linked = logits(model, **batch)
    place = link.placed[0]
    own = model.get_submodule(place.site.module)
    other = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight is own.weight]
    gw.merge(model, tie="split" if host == "bart" else "refuse")
    close(logits(model, **batch), linked)
    assert not other


def test_check_6_a_tied_table_is_refused_and_the_head_keeps_the_original() -> None:
    model, batch = tiny("gpt2"), tiny_batch("gpt2")
    table = model.transformer.wte.weight.detach().clone()
    stir(gw.attach(model, gw.AdaLink(rank=4)))
    linked = logits(model, **batch)
    with pytest.raises(NotMergeable, match="same tensor as lm_head"):
        gw.merge(model)
    gw.merge(model, tie="split")
    close(logits(model, **batch), linked)
    assert torch.equal(model.lm_head.weight, table)
    assert not torch.equal(model.transformer.wte.weight, table)


def test_check_7_tasks_switch_sample_by_sample() -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    alone = []
    for seed, name in enumerate(("captions", "questions")):
        stir(gw.attach(model, gw.AdaLink(rank=4), name=name), seed=seed)
        alone.append(logits(model, **batch))
    with gw.route(model, ["captions", "questions"], torch.tensor([0, 1, 0])):
        mixed = logits(model, **batch)
    close(mixed, torch.stack([alone[0][0], alone[1][1], alone[0][2]]), 1e-6)


def test_check_8_merges_into_a_projection_of_image_features_only_when_linear() -> None:
    batch = tiny_batch("vit")
    for nonlinearity in ("none", "relu"):
        model = tiny("vit")
        stir(gw.attach(model, gw.AdaLink(rank=4, nonlinearity=nonlinearity), head=False))
        linked = logits(model, **batch)
        if nonlinearity == "none":
            gw.merge(model)
        else:
            with pytest.raises(NotMergeable, match="not a linear map"):
                gw.merge(model)
        close(logits(model, **batch), linked)


def test_check_9_the_core_is_left_alone() -> None:
    model = tiny("t5")
    modules = dict(model.named_modules())
    kinds = {name: type(module).__qualname__ for name, module in modules.items()}
    keys = list(model.state_dict())
    adapter = gw.attach(model, gw.AdaLink(rank=4))
    assert list(adapter.sites) == ["encoder.embedding"]
    after = {name: module for name, module in model.named_modules() if ".grafts" not in name}
    assert all(module is modules[name] for name, module in after.items())
    assert {name: type(module).__qualname__ for name, module in after.items()} == kinds
    assert [key for key in model.state_dict() if ".grafts." not in key] == keys


def test_check_10_fifty_steps_lower_the_loss_of_a_copy_task() -> None:
    model, batch = tiny("llama"), tiny_batch("llama", padding=False)
    adapter = gw.attach(model, gw.AdaLink(rank=8))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(50):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("workspaces", [None, ("inputs",)])
def test_prompt_scope_leaves_decoded_tokens_alone(workspaces: Any) -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    technique = gw.AdaLink(rank=4, scope="prompt", workspaces=workspaces)
    stir(gw.attach(model, technique), 0.5)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    more = torch.tensor([[5], [6], [7]])
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        rest = torch.ones(3, 1, dtype=mask.dtype)
        stepped = model(
            input_ids=more, attention_mask=torch.cat([mask, rest], 1), past_key_values=copy.deepcopy(cache)
        ).logits
    whole = {"input_ids": torch.cat([ids, more], 1), "attention_mask": torch.cat([mask, rest], 1)}
    index = torch.cat([torch.zeros_like(ids), torch.full_like(more, -1)], 1)
    with gw.route(model, ["default"], index):
        close(stepped[:, -1], logits(model, **whole)[:, -1])
    chunk = {"input_ids": more.repeat(1, 2), "past_key_values": cache}
    with pytest.raises(StateError, match="in one call"):
        logits(model, **chunk)
    with pytest.raises(NotMergeable):
        gw.merge(model)
