"""Gates, and the adapters put together with them (UniPELT) and without (MAM), by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from answers import close, logits
from torch import Tensor

import graftwork as gw
from graftwork.errors import BadFile, CardConflict, NotMergeable
from graftwork.laws import stir
from graftwork.testing import tiny, tiny_batch

GATED = "gated addition"


def share(gate: Any, x: Tensor) -> Tensor:
    """(B, 1, 1) sigmoid(w x), averaged over positions."""
    return torch.sigmoid((x * gate.weight).sum(-1)).mean(1)[:, None, None]


def test_low_rank_change_behind_a_gate() -> None:
    model, x = tiny("llama"), torch.randn(3, 5, 32)
    adapter = gw.attach(model, gw.LoRA(rank=2, alpha=6, integration=GATED))  # type: ignore[arg-type]
    stir(adapter)
    place = adapter.placed[0]
    module: Any = place.graft.module
    host: Any = model.get_submodule(place.site.module)
    change = 3 * x @ module.inner.down.T @ module.inner.up.T
    close(host(x), x @ host.weight.T + share(module.gate, x) * change)
    assert adapter.count() == sum(2 * (32 + out) + 32 for out in (32, 16)) * 2


@pytest.mark.parametrize("insertion", ["sequential", "parallel"])
def test_bottleneck_behind_a_gate(insertion: Any) -> None:
    model, batch = tiny("bert"), tiny_batch("bert")
    technique = gw.BottleneckAdapter(width=4, insertion=insertion, integration=GATED)  # type: ignore[arg-type]
    adapter = gw.attach(model, technique, head=False)
    stir(adapter)
    by_hand: Any = tiny("bert")
    for layer, module in zip(by_hand.bert.encoder.layer, adapter.modules.values(), strict=True):
        kept: list[Tensor] = []
        layer.intermediate.dense.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))

        def behind(_: Any, __: Any, y: Tensor, module: Any = module, kept: list[Tensor] = kept) -> Tensor:
            x = y if insertion == "sequential" else kept.pop()
            return y + share(module.gate, x) * module.inner(x)

        layer.output.dense.register_forward_hook(behind)
    close(logits(model, **batch), logits(by_hand, **batch))


@pytest.mark.parametrize("hidden", [None, 8])
def test_prefix_values_behind_a_gate(hidden: int | None) -> None:
    model, batch = tiny("llama"), tiny_batch("llama", padding=False)
    gated = gw.attach(model, gw.PrefixTuning(length=3, hidden=hidden, gated=True), name="gated")
    stir(gated)
    plain: Any = tiny("llama")
    fixed = gw.attach(plain, gw.PrefixTuning(length=3, hidden=None))
    seen: list[Tensor] = []
    for layer, source, target in zip(
        plain.model.layers, gated.modules.values(), fixed.modules.values(), strict=True
    ):

        def multiply(_: Any, __: Any, kwargs: Any, source: Any = source, target: Any = target) -> None:
            key, value = source()
            x = kwargs["hidden_states"]
            seen.append(share(source.gate, x))
            target.key.data, target.value.data = key.detach(), (seen[-1][0] * value).detach()

        layer.self_attn.register_forward_pre_hook(multiply, with_kwargs=True)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        close(logits(model, **batch)[row], logits(plain, **one)[0])
    assert max(map(float, seen)) - min(map(float, seen)) > 0.01


def test_gated_and_other_prefixes_in_one_batch() -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    alone = []
    for seed, (name, technique) in enumerate(
        {
            "gated": gw.PrefixTuning(length=3, hidden=None, gated=True),
            "plain": gw.PrefixTuning(length=5, hidden=None),
            "both": [
                gw.PrefixTuning(length=2, hidden=None),
                gw.PrefixTuning(length=2, hidden=None, gated=True),
            ],
        }.items()
    ):
        stir(gw.attach(model, technique, name=name), seed=seed)
        alone.append(logits(model, **batch))
    with gw.route(model, ["gated", "plain", "both"], torch.tensor([2, 1, 0])):
        routed = logits(model, **batch)
    close(routed[1:], torch.stack([alone[1][1], alone[0][2]]))
    close(routed[0, 2:], alone[2][0, 2:])


def test_unipelt_is_three_gated_techniques_in_one_adapter(tmp_path: Path) -> None:
    model, batch = tiny("bert"), tiny_batch("bert")
    adapter = gw.attach(model, gw.unipelt(rank=2, length=3, width=4), head=False)
    assert [card.integration.value for card in adapter.cards] == [GATED] * 3
    assert [card.port.value for card in adapter.cards] == ["hidden", "attention", "hidden"]
    names = [name for name, _ in adapter.named_parameters() if name.endswith("gate.weight")]
    assert len(names) == 2 * 2 + 2 + 2  # query and value, prefix, feed-forward of two layers
    stir(adapter)
    out = model(**batch).logits
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    with pytest.raises(NotMergeable):
        gw.merge(model)
    gw.save(model, tmp_path)
    fresh = tiny("bert")
    gw.load(fresh, tmp_path)
    close(logits(fresh, **batch), out.detach())
    with pytest.raises(BadFile, match="no type"):
        gw.save(model, tmp_path, format="hf-peft")


def test_mam_is_a_prefix_and_a_scaled_parallel_adapter() -> None:
    model, batch = tiny("bert"), tiny_batch("bert")
    together = gw.attach(model, gw.mam(length=3, hidden=8, width=4), name="mam", head=False)
    stir(together)
    expected = logits(model, **batch)
    prefix = gw.PrefixTuning(length=3, hidden=8), gw.BottleneckAdapter.parallel(width=4)
    for name, technique in zip(("prefix", "parallel"), prefix, strict=True):
        gw.attach(model, technique, name=name, head=False)
    for name, index in (("prefix", 0), ("parallel", 1)):
        part = {key: module for (number, key), module in together.modules.items() if number == index}
        for (_, key), module in gw.adapters(model)[name].modules.items():
            module.load_state_dict(part[key].state_dict())
    with gw.active(model, "prefix", "parallel"):
        close(logits(model, **batch), expected)
    assert together.cards[1].scale == 4.0


def test_what_no_gate_can_multiply_is_refused(tmp_path: Path) -> None:
    for technique in (
        gw.OFT(block=4, integration=GATED),  # type: ignore[arg-type]
        gw.Compacter(integration=GATED),  # type: ignore[arg-type]
        gw.LoReFT(integration=GATED),  # type: ignore[arg-type]
    ):
        with pytest.raises(CardConflict):
            gw.attach(tiny("llama"), technique)
    for technique in (gw.IA3(integration=GATED), gw.PromptTuning(integration=GATED)):  # type: ignore[arg-type]
        with pytest.raises(CardConflict):
            _ = technique.card
    with pytest.raises(CardConflict, match="linear layers only"):
        gw.attach(tiny("llama"), gw.LoRA(workspaces=("embedding",), integration=GATED))  # type: ignore[arg-type]
    model = tiny("llama")
    gw.attach(model, gw.LoRA(rank=2, integration=GATED))  # type: ignore[arg-type]
    with pytest.raises(BadFile, match="gate"):
        gw.save(model, tmp_path, format="hf-peft")
