"""Context-PEFT (arXiv:2312.08900): adapter groups chosen by what a token is. The note's checks, by number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, BertConfig, BertModel

import graftwork as gw
from graftwork.engine.recompute import enable_checkpointing
from graftwork.errors import BadOption, StateError
from graftwork.laws import stir
from graftwork.models.captioner import Captioner, captioner
from graftwork.routing import ByToken
from graftwork.testing import tiny

TEXT_LORA = gw.LoRA(
    rank=2, workspaces=("text.attention.query", "text.attention.value", "text.feedforward.down")
)
TEXT_IA3 = gw.IA3(workspaces=("text.attention.key", "text.attention.value", "text.feedforward.activation"))


def made() -> tuple[Captioner, dict[str, Tensor]]:
    """A small captioner and a batch of two: one image each between text tokens."""
    torch.manual_seed(0)
    model = captioner(tiny("vit"), tiny("llama")).eval()
    rows, side = model.config.image_seq_length, model.config.vision_config.image_size
    ids = torch.randint(5, 90, (2, rows + 6))
    ids[:, 1 : 1 + rows] = model.config.image_token_id
    return model, {"input_ids": ids, "pixel_values": torch.randn(2, 3, side, side)}


def contexts(model: Captioner, technique: gw.Technique = TEXT_LORA, **options: Any) -> ByToken:
    for number, name in enumerate(("text", "image")):
        stir(gw.attach(model, technique, name=name, head=False), seed=number)
    gw.trainable(model, "text", "image")
    return ByToken({model.config.image_token_id: 1}, other=0, **options)


@pytest.mark.parametrize("technique", [gw.LoRA(rank=2), gw.IA3(), gw.BitFit()], ids=lambda t: t.name)
def test_check_1_step_zero_is_the_frozen_model(technique: gw.Technique) -> None:
    model, batch = tiny("bert").eval(), {"input_ids": torch.randint(5, 90, (2, 7))}
    before = model(**batch)[0]
    for name in ("text", "image"):
        gw.attach(model, technique, name=name, head=False)
    with gw.route(model, ["text", "image"], torch.randint(0, 2, (2, 7))):
        torch.testing.assert_close(model(**batch)[0], before)


def toy() -> tuple[nn.Module, Tensor, Tensor]:
    host = nn.Sequential(nn.Linear(3, 2))
    host[0].weight.data = torch.tensor([[1.0, 0, 2], [0, 1, -1]])
    host[0].bias.data.zero_()
    return host, torch.tensor([[[1.0, 1, 1], [2, 0, 1]]]), torch.tensor([[0, 1]])


def test_check_2_numbers() -> None:
    host, x, index = toy()
    torch.testing.assert_close(host(x)[0], torch.tensor([[3.0, 0], [4, -1]]))
    for name, down, up in (
        ("image", [[1.0, 0, 0]], [[1.0], [2]]),
        ("text", [[0.0, 1, 1]], [[-1.0], [0.5]]),
    ):
        adapter = gw.attach(host, gw.LoRA(rank=1, alpha=2), name=name)
        for key, tensor in adapter.named_parameters():
            tensor.data = torch.tensor(down if key.endswith("down") else up)
    with gw.route(host, ["image", "text"], index):
        torch.testing.assert_close(host(x)[0], torch.tensor([[5.0, 4], [2, 0]]))
    for technique, offset, wanted in (
        (gw.IA3(), 1.0, [[4.5, 0.0], [8, -1]]),
        (gw.BitFit(), 0.0, [[3.5, -0.25], [5, -1]]),
    ):
        host, x, index = toy()
        for name, vector in (("image", [0.5, -0.25]), ("text", [1.0, 0.0])):
            (tensor,) = gw.attach(host, technique, name=name).parameters()
            tensor.data = offset + torch.tensor(vector)
        with gw.route(host, ["image", "text"], index):
            torch.testing.assert_close(host(x)[0], torch.tensor(wanted))


@pytest.mark.parametrize("ranks", [(2, 2), (1, 5)])
def test_check_3_the_loop_equals_the_fused_form(ranks: tuple[int, int]) -> None:
    torch.manual_seed(0)
    host, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(2, 9, 6)
    index = torch.randint(0, 2, (2, 9))
    for name, rank in zip(("a", "b"), ranks, strict=True):
        stir(gw.attach(host, gw.LoRA(rank=rank), name=name))
    with gw.active(host):
        loop = host(x)
        base = loop.clone()
    for number, name in enumerate(("a", "b")):
        with gw.active(host, name):
            loop = loop + (host(x) - base) * (index == number)[..., None]
    with gw.route(host, ["a", "b"], index):
        torch.testing.assert_close(host(x), loop, atol=1e-6, rtol=1e-5)


def test_check_4_isolation() -> None:
    model, batch = made()
    router = contexts(model)
    first: list[Tensor] = []
    layer = model.model.language_model.layers[0]
    layer.register_forward_hook(
        lambda *call: first.append(call[-1] if isinstance(call[-1], Tensor) else call[-1][0])
    )
    image = batch["input_ids"] == model.config.image_token_id
    with gw.route(model, ["text", "image"], by=router):
        model(**batch)
        stir(gw.adapters(model)["image"], seed=9, size=0.5)
        model(**batch)
        before = torch.cummax(image, 1).values.logical_not()  # causal: nothing of the image came before these
        assert torch.equal(first[0][before], first[1][before])
        assert not torch.equal(first[0][image], first[1][image])
        model(input_ids=batch["input_ids"][~image].view(2, -1)).logits.square().mean().backward()
    assert all(p.grad is None or not p.grad.any() for p in gw.adapters(model)["image"].parameters())
    assert all(p.grad is not None and p.grad.any() for p in gw.adapters(model)["text"].parameters())


@pytest.mark.parametrize("technique", [TEXT_LORA, TEXT_IA3], ids=lambda t: t.name)
def test_check_5_one_context_for_all_is_the_ordinary_technique(technique: gw.Technique) -> None:
    model, batch = made()
    contexts(model, technique)
    with gw.active(model, "text"):
        wanted = model(**batch).logits
    with gw.route(model, ["text"], by=ByToken({}, other=0)):
        torch.testing.assert_close(model(**batch).logits, wanted)


def test_nested_contexts_that_multiply_are_a_sum_with_another_vector() -> None:
    """g_all g = g_all + l - 1 with l = g_all g - g_all + 1: docs/decisions/017."""
    model, batch = made()
    for seed, name in enumerate(("all", "image")):
        stir(gw.attach(model, TEXT_IA3, name=name), 0.3, seed=seed)
    general, own = (list(gw.adapters(model)[name].parameters()) for name in ("all", "image"))
    with torch.no_grad():
        with gw.active(model, "all", "image"):
            product = model(**batch).logits
        for g_all, g in zip(general, own, strict=True):
            g.copy_(g_all * g - g_all + 1)
        with gw.route(model, ["all", "image"], weights=torch.ones(len(product), 2)):
            torch.testing.assert_close(model(**batch).logits, product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("technique", [TEXT_LORA, TEXT_IA3], ids=lambda t: t.name)
def test_check_6_cached_decoding_is_full_computation(technique: gw.Technique) -> None:
    model, batch = made()
    router = contexts(model, technique)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with gw.route(model, ["text", "image"], by=router):
        assert torch.equal(
            model.generate(**batch, **options), model.generate(**batch, use_cache=False, **options)
        )


def test_check_7_merging_needs_one_context() -> None:
    model, batch = made()
    router = contexts(model)
    text = batch["input_ids"][:, -5:]
    with gw.route(model, ["text", "image"], by=router):
        wanted = model(text).logits
        with pytest.raises(StateError, match="route"):
            gw.merge(model, "text", "image")
    gw.active(model)
    gw.merge(model, "text")
    torch.testing.assert_close(model(text).logits, wanted, atol=1e-5, rtol=1e-4)
    gw.unmerge(model)


def test_check_8_mask_dropout_keeps_the_mean_and_ends_with_training() -> None:
    torch.manual_seed(0)
    host, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(1, 4, 6)
    stir(gw.attach(host, gw.LoRA(rank=2), name="a"), size=0.5)
    router = ByToken({}, other=0, dropout=0.4)
    wanted = host(x)
    ids = torch.zeros(4000, 4, dtype=torch.long)
    with gw.route(host, ["a"], weights=router(host.train(), {"input_ids": ids})):
        found = host(x.expand(4000, -1, -1))
    with gw.active(host):
        change = wanted - host(x)
    assert ((found.mean(0) - wanted).abs() < 0.07 * change.abs() + 1e-4).all()  # 5 standard deviations
    assert not router(host.eval(), {"input_ids": ids}).is_floating_point()
    with pytest.raises(BadOption, match="dropout=1"):
        ByToken({}, dropout=1.0)


@pytest.mark.parametrize(
    ("technique", "total"),
    [
        (gw.LoRA(rank=4, workspaces=("attention.*",)), 1024),
        (gw.LoRA(rank=4, workspaces=("attention.*", "feedforward.up", "feedforward.down")), 2304),
        (gw.IA3(), 192),
        (gw.BitFit(workspaces=("attention.*", "feedforward.up", "feedforward.down")), 288),
    ],
    ids=["lora attention", "lora all", "ia3", "bitfit"],
)
def test_check_9_totals_of_two_contexts(technique: gw.Technique, total: int) -> None:
    config = BertConfig(
        vocab_size=20, hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = BertModel(config)
    assert sum(gw.attach(model, technique, name=name).count() for name in ("text", "image")) == total


def test_check_10_rows_of_an_image_and_recomputation(tmp_path: Path) -> None:
    model, batch = made()
    patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    assert model.config.image_seq_length == patches + 2
    with pytest.raises(ValueError, match="do not match"):
        model(input_ids=batch["input_ids"][:, 2:], pixel_values=batch["pixel_values"])
    router = contexts(model)

    def gradients(recompute: bool) -> list[Tensor]:
        if recompute:
            enable_checkpointing(model.train())
        with gw.route(model, ["text", "image"], by=router):
            loss = model(**batch).logits.square().mean()
        gw.active(model)
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for name in ("text", "image") for p in gw.adapters(model)[name].parameters()]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(a, b)


def test_a_captioner_is_saved_and_loaded(tmp_path: Path) -> None:
    model, batch = made()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again) is Captioner
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    with pytest.raises(BadOption, match="no vision transformer"):
        captioner(tiny("llama"), tiny("llama"))
    with pytest.raises(BadOption, match="no decoder"):
        captioner(tiny("vit"), tiny("bert"))


@pytest.mark.slow
def test_one_compiled_graph_serves_every_mask() -> None:
    torch.compiler.reset()
    host, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(2, 9, 6)
    for number, name in enumerate(("a", "b")):
        stir(gw.attach(host, gw.LoRA(rank=2), name=name), seed=number)
    run = torch.compile(host, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        index = torch.randint(-1, 2, (2, 9), generator=torch.Generator().manual_seed(seed))
        with gw.route(host, ["a", "b"], index):
            torch.testing.assert_close(run(x), host(x), atol=1e-6, rtol=1e-5)
