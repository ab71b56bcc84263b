"""Predicted costs against what a real training step keeps and counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.analysis.cost import Step, cost, example_inputs
from graftwork.errors import BadOption, StateError
from graftwork.models.captioner import captioner
from graftwork.testing import tiny, tiny_batch

TECHNIQUES = {
    "lora": gw.LoRA(rank=4),
    "ia3": gw.IA3(),
    "adapter": gw.BottleneckAdapter(width=8),
    "prefix": gw.PrefixTuning(length=4, hidden=None),
    "norm": gw.NormTuning(),
    "full": gw.FineTuning(),
}
HOSTS = ("llama", "bert-classification", "gpt2", "t5", "vit")


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_prediction_is_what_a_step_keeps(host: str, name: str) -> None:
    technique = TECHNIQUES[name]
    model = tiny(host)
    predicted = cost(model, technique, batch=3, sequence=16)
    adapter = gw.attach(model, technique)
    model.train()
    step = Step(model, example_inputs(model, 3, 16))
    assert predicted.trainable_parameters == sum(p.numel() for p in adapter.parameters())
    assert predicted.base_parameters == sum(p.numel() for p in tiny(host).parameters())
    assert abs(predicted.activation_bytes - step.kept()) <= 0.1 * step.kept()
    forward, whole = step.flops()
    assert predicted.forward_flops == pytest.approx(forward, rel=0.02)
    assert predicted.step_flops == pytest.approx(whole, rel=0.02)


def test_a_meta_model_costs_the_same() -> None:
    with torch.device("meta"):
        empty = tiny("llama").to("meta")
    assert cost(empty, gw.LoRA(rank=4), sequence=8) == cost(tiny("llama"), gw.LoRA(rank=4), sequence=8)


def test_the_model_is_not_touched() -> None:
    model = tiny("bert")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    cost(model, gw.LoRA(), sequence=16)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_checkpointing_keeps_less() -> None:
    plain = cost(tiny("llama"), gw.LoRA(), batch=2, sequence=32)
    less = cost(tiny("llama"), gw.LoRA(), batch=2, sequence=32, checkpointing=True)
    assert less.activation_bytes < 0.6 * plain.activation_bytes


def test_bytes_follow_the_formula() -> None:
    model = tiny("llama").to(torch.bfloat16)
    found = cost(model, gw.LoRA(rank=2), sequence=8)
    assert found.optimiser_bytes == 2 * 4 * found.trainable_parameters
    assert found.gradient_bytes == found.file_bytes == 4 * found.trainable_parameters
    assert found.weight_bytes == 2 * found.base_parameters + 4 * found.trainable_parameters


def test_own_inputs_for_any_module() -> None:
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    found = cost(net, gw.LoRA(rank=2, workspaces=("linear",)), inputs={"input": torch.zeros(5, 6)})
    assert found.forward_flops >= 2 * 5 * (6 * 12 + 12 * 3)


def test_bad_requests_are_told() -> None:
    with pytest.raises(BadOption, match="128 is longer than the 64 positions"):
        cost(tiny("bert"), gw.LoRA(), sequence=128)
    with pytest.raises(BadOption, match="optimiser='lion'"):
        cost(tiny("llama"), gw.LoRA(), optimiser="lion")
    with pytest.raises(BadOption, match="inputs="):
        cost(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), gw.LoRA(workspaces=("linear",)))
    attached = tiny("llama")
    gw.attach(attached, gw.LoRA())
    with pytest.raises(StateError, match="bare"):
        cost(attached, gw.LoRA())


def test_example_inputs_run() -> None:
    for host in HOSTS:
        model = tiny(host)
        model(**example_inputs(model, 2, 8))
        assert tiny_batch(host)


def test_flops_of_a_low_rank_linear_by_hand() -> None:
    """Fused and in-place products count as what they compute."""
    batch, wide, narrow, rank = 8, 64, 32, 4
    model = nn.Sequential(nn.Linear(wide, narrow))
    found = cost(
        model, gw.LoRA(rank=rank, workspaces=("linear",)), inputs={"input": torch.zeros(batch, wide)}
    )
    thin = rank * (wide + narrow)
    assert found.forward_flops == 2 * batch * (wide * narrow + thin)
    backward = found.step_flops - found.forward_flops
    assert 2 * batch * (2 * thin - rank * wide) <= backward <= 2 * batch * (3 * thin + wide * narrow)


def test_dropout_needs_no_values() -> None:
    with_dropout, without = (cost(tiny("llama"), gw.LoRA(rank=2, dropout=p), sequence=8) for p in (0.1, 0.0))
    assert with_dropout.step_flops == without.step_flops


def test_a_model_that_counts_its_image_tokens() -> None:
    """transformers compares the number of image tokens with the images' rows: a value, where only shapes are."""
    model = captioner(tiny("vit"), tiny("llama"))
    ids = torch.zeros(2, model.config.image_seq_length + 4, dtype=torch.long)
    ids[:, : model.config.image_seq_length] = model.config.image_token_id
    inputs = {"input_ids": ids, "pixel_values": torch.zeros(2, 3, 16, 16), "labels": ids}
    technique = gw.LoRA(rank=2, workspaces=("text.attention.query",))
    found = cost(model, technique, inputs=inputs)
    adapter = gw.attach(model, technique)
    assert found.trainable_parameters == adapter.count()
    gw.detach(model)
    assert found.base_parameters == sum(p.numel() for p in model.parameters())
    assert found.step_flops > found.forward_flops > 0
