"""Task heads: what is trained afresh with an adapter, and what never is."""

import pytest
from hosts import ALL, host
from torch import nn

from graftwork.anatomy.resolve import all_sites, head_sites
from graftwork.errors import UnknownName
from graftwork.reference.site import Kind
from graftwork.testing import FAMILIES, tiny

TASKS = ("classification", "token-classification", "question-answering", "multiple-choice")


def heads(model):
    return [site.module for site in head_sites(model)]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("bert-classification", ["classifier"]),
        ("bert-token-classification", ["classifier"]),
        ("bert-question-answering", ["qa_outputs"]),
        ("bert-multiple-choice", ["classifier"]),
        ("roberta-classification", ["classifier.dense", "classifier.out_proj"]),
        ("electra-classification", ["classifier.dense", "classifier.out_proj"]),
        ("electra-multiple-choice", ["sequence_summary.summary", "classifier"]),
        ("distilbert-classification", ["pre_classifier", "classifier"]),
        ("modernbert-classification", ["head.dense", "head.norm", "classifier"]),
        ("deberta-v2-classification", ["pooler.dense", "classifier"]),
        ("gpt2-classification", ["score"]),
        ("llama-classification", ["score"]),
        ("qwen2-question-answering", ["qa_outputs"]),
        ("opt-classification", ["score"]),
        ("t5-classification", ["classification_head.dense", "classification_head.out_proj"]),
        ("t5-question-answering", ["qa_outputs"]),
        ("t5-token-classification", ["classifier"]),
        ("bart-classification", ["classification_head.dense", "classification_head.out_proj"]),
        ("vit", ["classifier"]),
        ("dinov2", ["classifier"]),
        ("resnet", ["classifier.1"]),
        ("convnext", ["classifier"]),
        ("swin", ["classifier"]),
    ],
)
def test_heads(name, expected):
    assert heads(tiny(name)) == expected


@pytest.mark.parametrize("name", ALL)
def test_a_head_is_what_the_bare_model_lacks(name):
    """The parameters of a task model that its bare model does not have."""
    for task in TASKS:
        try:
            model = tiny(f"{name}-{task}")
        except UnknownName:
            continue
        inner = getattr(model, model.base_model_prefix, None)
        known = {id(p) for p in (inner if inner is not None else tiny(f"{name}-base")).parameters()}
        if inner is None:
            bare = dict(tiny(f"{name}-base").named_parameters())
            known = {id(p) for n, p in model.named_parameters() if n in bare}
        fresh = {n.rpartition(".")[0] for n, p in model.named_parameters() if id(p) not in known}
        assert set(heads(model)) == fresh


@pytest.mark.parametrize("name", [name for name in ALL if FAMILIES[name].inputs != "image"])
def test_language_models_have_no_task_head(name):
    assert heads(host(name)) == []


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "modernbert", "deberta-v2"])
def test_of_a_masked_model_only_the_projection_is_the_lm_head(name):
    model = host(name)
    sites = [site for site in all_sites(model) if site.workspace == "lm_head"]
    assert [model.get_submodule(site.module) for site in sites] == [model.get_output_embeddings()]
    assert {s.kind for s in all_sites(model) if s.workspace == "lm_head.transform"} == {
        Kind.LINEAR,
        Kind.NORM,
    }


@pytest.mark.parametrize("name", ["bert-base", "vit-base"])
def test_bare_models_have_no_head(name):
    assert heads(tiny(name)) == []


def test_a_head_tied_to_the_embedding_is_none():
    model = tiny("bert-classification", {"num_labels": 99})
    model.classifier.weight = model.bert.embeddings.word_embeddings.weight
    assert heads(model) == []


def test_a_head_of_the_users_own_around_a_known_base():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = tiny("bert-base")
            self.classifier = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
            self.extra = nn.Linear(32, 32)

    model = Own()
    assert heads(model) == ["classifier.0", "classifier.2"]
    assert [site.module for site in all_sites(model) if site.workspace == "linear"] == ["extra"]
    assert "0/attention.query" in {site.key for site in all_sites(model)}
