"""AdapterFusion: its formula on a host, what it trains, and the adapters it needs."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import close, logits
from torch import Tensor

import graftwork as gw
from graftwork.errors import BadFile, BadOption, CardConflict, NothingMatches, NotMergeable, StateError
from graftwork.laws import stir
from graftwork.testing import tiny, tiny_batch


def two_tasks(host: str = "bert") -> Any:
    model = tiny(host)
    for seed, name in enumerate(("nli", "sentiment")):
        stir(gw.attach(model, gw.BottleneckAdapter(width=4), name=name, head=False), 0.5, seed=seed)
    return model


def fused(model: Any) -> gw.Adapter:
    adapter = gw.attach(model, gw.AdapterFusion(of=("nli", "sentiment")), name="fused", head=False)
    stir(adapter, 0.3, seed=5)
    return adapter


def test_formula_on_a_host() -> None:
    model, batch = two_tasks(), tiny_batch("bert")
    adapter = fused(model)
    by_hand: Any = tiny("bert")
    parts = [list(gw.adapters(model)[name].modules.values()) for name in ("nli", "sentiment")]
    for number, (layer, fusion) in enumerate(
        zip(by_hand.bert.encoder.layer, adapter.modules.values(), strict=True)
    ):

        def mixed(_: Any, __: Any, h: Tensor, number: int = number, fusion: Any = fusion) -> Tensor:
            answers = [part[number](h) for part in parts]
            query = h @ fusion.query.weight.T
            scores = torch.stack([(query * (z @ fusion.key.weight.T)).sum(-1) for z in answers])
            weights = scores.exp() / scores.exp().sum(0)
            values = [z @ fusion.value.weight.T for z in answers]
            return h + sum(w[..., None] * v for w, v in zip(weights, values, strict=True))

        layer.output.dense.register_forward_hook(mixed)
    close(logits(model, **batch), logits(by_hand, **batch))
    assert adapter.count() == 2 * 3 * 32 * 32


def test_values_start_as_they_are_and_only_the_fusion_trains() -> None:
    model, batch = two_tasks(), tiny_batch("bert")
    adapter = gw.attach(model, gw.AdapterFusion(of=("nli",)), name="fused", head=False)
    with gw.active(model, "nli"):
        alone = logits(model, **batch)
    close(logits(model, **batch), alone)  # one adapter, weight 1, V the identity
    model(**batch).logits.square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".fused." in name}
    assert {name.rsplit(".", 2)[1] for name, _ in adapter.named_parameters()} == {"query", "key", "value"}


def test_files_need_the_adapters_first(tmp_path: Path) -> None:
    model, batch = two_tasks(), tiny_batch("bert")
    fused(model)
    expected = logits(model, **batch)
    for name in ("nli", "sentiment", "fused"):
        gw.save(model, tmp_path, name=name)
    fresh = tiny("bert")
    with pytest.raises(BadFile, match="no adapter called 'nli' is attached"):
        gw.load(fresh, tmp_path, name="fused")
    for name in ("nli", "sentiment", "fused"):
        gw.load(fresh, tmp_path, name=name)
    with gw.active(fresh, "fused"):
        close(logits(fresh, **batch), expected)


def test_fused_adapters_stay_while_they_are_read() -> None:
    model, batch = two_tasks(), tiny_batch("bert")
    bare = logits(tiny("bert"), **batch)
    fused(model)
    with pytest.raises(StateError, match="'fused' reads 'nli'"):
        gw.detach(model, "nli")
    gw.detach(model, "fused", "nli")
    assert list(gw.adapters(model)) == ["sentiment"]
    gw.detach(model)
    assert torch.equal(logits(model, **batch), bare)


def test_what_cannot_be_fused_says_so() -> None:
    model = two_tasks()
    with pytest.raises(BadOption, match="names no adapter"):
        gw.attach(model, gw.AdapterFusion(), name="x")
    with pytest.raises(NothingMatches, match="no adapter called 'nil'"):
        gw.attach(model, gw.AdapterFusion(of=("nil",)), name="x")
    gw.attach(model, gw.SSF(workspaces=("feedforward",)), name="ssf", head=False)
    with pytest.raises(CardConflict, match="ssf of 'ssf'"):
        gw.attach(model, gw.AdapterFusion(of=("nli", "ssf")), name="x")
    gw.attach(model, gw.LoReFT(workspaces=("feedforward",)), name="reft", head=False)
    with pytest.raises(CardConflict, match="loreft of 'reft'"):
        gw.attach(model, gw.AdapterFusion(of=("nli", "reft")), name="x")
    gw.attach(model, gw.BottleneckAdapter(width=4, layers=(0,)), name="first", head=False)
    with pytest.raises(NothingMatches, match="'first' has no hidden-port module at 1/feedforward"):
        gw.attach(model, gw.AdapterFusion(of=("nli", "first")), name="x")
    fused(model)
    with pytest.raises(NotMergeable):
        gw.merge(model)


@pytest.mark.parametrize("host", ["llama", "vit"])
def test_routes_per_sample_and_token_copies_and_pickles(host: str) -> None:
    model, batch = two_tasks(host), tiny_batch(host)
    alone = {}
    fused(model)
    for name in ("nli", "fused"):
        with gw.active(model, name):
            alone[name] = logits(model, **batch)
    with gw.route(model, ["nli", "fused"], torch.tensor([0, 1, 0])):
        close(logits(model, **batch)[1], alone["fused"][1])
    if host == "llama":
        with gw.route(model, ["fused"], torch.zeros(3, 7, dtype=torch.long)):
            close(logits(model, **batch), alone["fused"])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        close(logits(twin, **batch), logits(model, **batch))
        stir(gw.adapters(twin)["nli"], seed=9)
        with gw.active(model, "fused"), gw.active(twin, "fused"):
            assert not torch.allclose(logits(twin, **batch), logits(model, **batch))
