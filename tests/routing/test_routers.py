"""Routes decided in each forward: by token, by a classifier, and what a router may and may not do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import graftwork as gw
from graftwork.errors import BadOption, RouteError, StateError
from graftwork.laws import stir
from graftwork.routing import ByToken, XLoRA
from graftwork.testing import tiny, tiny_batch

IMAGE = 3


def two_adapters(name: str = "llama") -> tuple[torch.nn.Module, dict[str, Tensor]]:
    model, batch = tiny(name).eval(), tiny_batch(name)
    for number, adapter in enumerate(("text", "image")):
        stir(gw.attach(model, gw.LoRA(rank=2 + number), name=adapter, head=False), seed=number)
    return model, batch


def test_a_router_equals_the_index_it_gives() -> None:
    model, batch = two_adapters()
    ids = batch["input_ids"].clone()
    ids[:, 1:3] = IMAGE
    with gw.route(model, ["text", "image"], (ids == IMAGE).long()):
        wanted = model(ids).logits
    with gw.route(model, ["text", "image"], by=ByToken({IMAGE: 1}, other=0)):
        torch.testing.assert_close(model(ids).logits, wanted)
        torch.testing.assert_close(model(input_ids=ids).logits, wanted)
        with pytest.raises(StateError, match="a route is set"):
            gw.active(model, "text")
        with pytest.raises(RouteError, match="call the model"):
            model.model(ids)
    with gw.active(model):
        base = model(ids).logits
    with gw.route(model, ["text", "image"], by=ByToken({})):
        torch.testing.assert_close(model(ids).logits, base)


def test_cached_generation_routes_the_new_tokens() -> None:
    model, batch = two_adapters()
    ids = batch["input_ids"][:, :5].clone()
    ids[:, :3] = IMAGE
    options = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    with gw.route(model, ["text", "image"], by=ByToken({IMAGE: 1}, other=0)):
        cached = model.generate(ids, **options)
        whole = model.generate(ids, use_cache=False, **options)
    assert torch.equal(cached, whole)


def test_gradients_reach_the_router_through_recomputation() -> None:
    model, batch = two_adapters()
    gw.trainable(model)
    router = torch.nn.Linear(1, 2)

    def weights(_: torch.nn.Module, arguments: dict[str, Tensor]) -> Tensor:
        return router(torch.ones(len(arguments["input_ids"]), 1)).softmax(-1)

    found = []
    for recompute in (False, True):
        if recompute:
            gw.engine.recompute.enable_checkpointing(model.train())
        router.zero_grad()
        with gw.route(model, ["text", "image"], by=weights):
            loss = model(**batch).logits.square().mean()
        loss.backward()
        found.append(router.bias.grad.clone())
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(found[0], found[1])


def test_a_router_must_answer_a_tensor_and_errors_leave_the_route_set() -> None:
    model, batch = two_adapters()
    with gw.route(model, ["text"], by=lambda model, arguments: [0]):  # type: ignore[arg-type,return-value]
        for _ in range(2):
            with pytest.raises(RouteError, match="answers list"):
                model(**batch)
    with pytest.raises(RouteError, match="one of index, weights and by"):
        gw.route(model, ["text"], torch.zeros(3, dtype=torch.long), by=ByToken({}))
    with gw.route(model, ["text"], by=ByToken({})), pytest.raises(RouteError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, model.config.hidden_size))


def test_detaching_an_adapter_ends_its_router() -> None:
    model, batch = two_adapters()
    gw.route(model, ["text", "image"], by=ByToken({}, other=0))
    gw.detach(model, "image")
    with gw.active(model, "text"):
        model(**batch)


class TestXLoRA:
    def test_equal_weights_at_zero_and_one_adapter_under_top_one(self) -> None:
        model, batch = two_adapters()
        layers = model.config.num_hidden_layers
        router = XLoRA(model.config.hidden_size, layers, 2).eval()
        torch.nn.init.zeros_(router.classifier[-1].weight)
        torch.nn.init.zeros_(router.classifier[-1].bias)
        with gw.route(model, ["text", "image"], weights=torch.full((3, 2), 0.5)):
            wanted = model(**batch).logits
        with gw.route(model, ["text", "image"], by=router):
            torch.testing.assert_close(model(**batch).logits, wanted)
        first = XLoRA(model.config.hidden_size, layers, 2, top_k=1).eval()
        first.classifier[-1].bias.data = torch.tensor([50.0, 0.0]).repeat(layers)
        with gw.active(model, "text"):
            alone = model(**batch).logits
        with gw.route(model, ["text", "image"], by=first):
            torch.testing.assert_close(model(**batch).logits, alone)

    def test_only_the_classifier_learns(self) -> None:
        model, batch = two_adapters()
        gw.trainable(model)
        router = XLoRA(model.config.hidden_size, model.config.num_hidden_layers, 2, depth=2, size=8)
        with gw.route(model, ["text", "image"], by=router):
            model(**batch).logits.square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in router.classifier[-1].parameters())
        assert all(p.grad is None for p in model.parameters())

    def test_a_cache_is_refused(self) -> None:
        model, batch = two_adapters()
        router = XLoRA(model.config.hidden_size, model.config.num_hidden_layers, 2)
        ids = batch["input_ids"]
        with gw.route(model, ["text", "image"], by=router):
            with pytest.raises(RouteError, match="use_cache=False"):
                model.generate(ids, max_new_tokens=3, min_new_tokens=3)
            model.generate(ids, max_new_tokens=2, min_new_tokens=2, use_cache=False)

    def test_bad_options(self) -> None:
        for options, words in (
            ({"depth": 0}, "depth=0"),
            ({"top_k": 3}, "top_k=3"),
            ({"temperature": 0.0}, "temp"),
        ):
            with pytest.raises(BadOption, match=words):
                XLoRA(8, 2, 2, **options)

    def test_agrees_with_peft(self, tmp_path: Path) -> None:
        """The same adapters and classifier in HF PEFT, whose layers are its LoRA modules: so one weight for all."""
        peft = pytest.importorskip("peft")
        model, batch = two_adapters()
        for name in ("text", "image"):
            gw.save(model, tmp_path, name=name, format="hf-peft")
        layers = model.config.num_hidden_layers
        router = XLoRA(model.config.hidden_size, layers, 2).eval()
        one = torch.nn.Linear(model.config.hidden_size, 2)
        router.classifier[-1].weight.data = one.weight.data.repeat(layers, 1)
        router.classifier[-1].bias.data = one.bias.data.repeat(layers)
        with gw.route(model, ["text", "image"], by=router):
            ours = model(**batch).logits
        host = tiny("llama").eval()
        host.config.use_cache = False
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=model.config.hidden_size,
            xlora_depth=1,
            adapters={"0": str(tmp_path / "text"), "1": str(tmp_path / "image")},
            layerwise_scalings=False,
            softmax_temperature=1.0,
        )
        theirs = peft.get_peft_model(host, config).eval()
        classifier = theirs.base_model.internal_xlora_classifier
        last = [layer for layer in classifier.layers if isinstance(layer, torch.nn.Linear)][-1]
        last.load_state_dict(one.state_dict())
        torch.testing.assert_close(theirs(**batch).logits, ours, atol=1e-5, rtol=1e-4)
