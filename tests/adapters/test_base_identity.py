"""The base's identity: the same for every copy of one base, another for every other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedModel,
)

from graftwork.adapters.base import BaseIdentity, differences, identify, read_identity
from graftwork.adapters.documents import dump, parse
from graftwork.errors import BadFile

HEADS = ("score", "lm_head", "classifier", "bert.pooler")


def llama(seed: int = 0, **options: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**(shape | heads | options)))


def identity(model: nn.Module) -> BaseIdentity:
    return identify(model, (), HEADS)


def test_a_copy_is_the_same_base_whatever_its_precision() -> None:
    one = identity(llama())
    assert differences(one, identity(llama())) == []
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        other = identity(llama().to(dtype))
        assert differences(one, other) == [], dtype
        assert differences(other, one) == [], dtype
    assert identity(llama().bfloat16()).fingerprint == one.fingerprint


def test_every_random_weight_of_a_large_sample_survives_rounding() -> None:
    torch.manual_seed(0)
    big = nn.Sequential(*[nn.Linear(32, 32) for _ in range(16)])
    for dtype in (torch.bfloat16, torch.float16):
        assert differences(identity(big), identity(copy.deepcopy(big).to(dtype))) == []
        assert (
            differences(identity(copy.deepcopy(big).bfloat16()), identity(copy.deepcopy(big).to(dtype))) == []
        )


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: llama(1), "the weights themselves"),
        (lambda: llama(vocab_size=48), "48x16"),
        (lambda: llama(num_hidden_layers=3), "parameters of shape"),
        (
            lambda: llama(num_attention_heads=2, head_dim=8, num_key_value_heads=1),
            "num_attention_heads 4, here 2",
        ),
        (
            lambda: AutoModelForSequenceClassification.from_config(BertConfig(hidden_size=24, vocab_size=9)),
            "model type llama, here bert",
        ),
    ],
)
def test_another_base_is_told_apart_and_why(other: object, said: str) -> None:
    assert callable(other)
    found = differences(identity(llama()), identity(other()))
    assert any(said in line for line in found), found


def test_a_slightly_trained_base_is_another_base() -> None:
    model = llama()
    before = identity(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-6)
    assert differences(before, identity(model))


def test_heads_poolers_and_their_class_do_not_count() -> None:
    base = llama()
    classifier = AutoModelForSequenceClassification.from_config(base.config)
    classifier.model.load_state_dict(base.model.state_dict())
    assert differences(identity(base), identity(classifier)) == []


def test_adapter_tensors_and_renamed_modules_do_not_count() -> None:
    model = llama()
    before = identity(model)
    model.model.layers[0].self_attn.q_proj.graft = nn.Linear(16, 2)
    mine = list(model.model.layers[0].self_attn.q_proj.graft.parameters())
    assert differences(before, identify(model, mine, HEADS)) == []
    assert identify(model, mine, HEADS).fingerprint == before.fingerprint
    assert differences(before, identity(model)) != []


def test_a_rename_upstream_changes_nothing() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4), nn.Linear(4, 8)
    one, other = nn.Module(), nn.Module()
    one.a, one.b, other.query, other.key = first, second, first, second
    assert differences(identity(one), identity(other)) == []


def test_meta_and_integer_weights_have_no_values_to_compare_but_shapes() -> None:
    with torch.device("meta"):
        empty, longer = llama(), llama(num_hidden_layers=3)
    assert differences(identity(llama()), identity(empty)) == []
    assert differences(identity(llama()), identity(longer)) != []


def test_identity_survives_json_and_refuses_nonsense() -> None:
    one = identity(llama())
    text = dump(one.document())
    assert read_identity(parse(text, "x"), "x") == one
    assert len(text) < 4000
    with pytest.raises(BadFile, match="count parameters"):
        read_identity(one.document() | {"shapes": {"8x8": "two"}}, "x")
