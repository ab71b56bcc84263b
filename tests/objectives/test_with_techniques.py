"""Objectives on the techniques they were published with."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor

import graftwork as gw
from graftwork.objectives import Consistency, Diversity, Objectives, Orthogonality, SingularValues
from graftwork.testing import tiny, tiny_batch

torch.set_num_threads(1)
BETA, GAMMA = 0.03, 0.07


def labelled() -> dict[str, Tensor]:
    batch = dict(tiny_batch("llama"))
    return {**batch, "labels": batch["input_ids"].clone()}


def test_kasa_penalties_are_those_of_peft_value_and_gradient() -> None:
    torch.manual_seed(0)
    model, batch = tiny("llama"), labelled()
    ours = gw.attach(model, gw.KaSA(rank=3)).modules
    config = peft.LoraConfig(
        r=3,
        target_modules=["q_proj", "v_proj"],
        kasa_config=peft.KasaConfig(beta=BETA, gamma=GAMMA),
    )
    theirs = peft.get_peft_model(tiny("llama"), config)
    layers = [m for m in theirs.modules() if hasattr(m, "lora_diag")]
    assert len(layers) == len(ours)
    modules = list(ours.values())
    for module, layer in zip(modules, layers, strict=True):
        for own, other in _paired(module, layer):
            torch.nn.init.normal_(own, std=0.5)
            other.data.copy_(own.data.reshape(other.shape))
    expected = theirs.base_model._get_kasa_loss()
    expected.backward()
    outputs = model(**batch)
    terms = [SingularValues(weight=BETA), Orthogonality(weight=GAMMA)]
    total = Objectives(model, terms)(outputs, batch, progress=0)
    extra = total.loss - outputs.loss
    assert extra.item() == pytest.approx(expected.item(), rel=1e-5)
    extra.backward()
    for module, layer in zip(modules, layers, strict=True):
        for own, other in _paired(module, layer):
            torch.testing.assert_close(own.grad, other.grad.reshape(own.shape), atol=2e-6, rtol=1e-4)


def _paired(module: torch.nn.Module, layer: torch.nn.Module) -> list[tuple[torch.nn.Parameter, ...]]:
    return [
        (module.down, layer.lora_A["default"].weight),
        (module.up, layer.lora_B["default"].weight),
        (module.values, layer.lora_diag["default"]),
    ]


def test_the_teacher_of_kasa_is_the_base_before_its_truncation() -> None:
    model, batch = tiny("llama"), labelled()
    with torch.no_grad():
        before = model(**batch).logits
    gw.attach(model, gw.KaSA(rank=8))
    total = Objectives(model, [Consistency(weight=1)])(model(**batch), batch, progress=0)
    assert total.parts["consistency"] > 1e-4  # what the cut changed
    with gw.active(model), torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, before)


def test_check_2_ba_lora_starts_at_its_teacher() -> None:
    model, batch = tiny("llama"), labelled()
    gw.attach(model, gw.BALoRA(rank=4))
    terms = Objectives(model, [Consistency(weight=1, temperature=2), Diversity(weight=0.005)])
    parts = terms(model(**batch), batch, progress=0).parts
    assert parts["consistency"].item() == pytest.approx(0, abs=1e-6)
    assert parts["diversity"] < 0
