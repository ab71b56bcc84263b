"""Sites that vanish after attach are told of, embeddings that grow keep their adapter or say why not."""

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.errors import GraftworkError, StateError
from graftwork.testing import tiny

from .kit import PROJECTIONS, batch, grafted, llama, loss_of


def _with_both_ends() -> nn.Module:
    model = llama()
    grafted(model, gw.LoRA(rank=2, workspaces=("embedding", "lm_head", "attention.query")))
    model(**batch())
    return model


def test_resizing_drops_the_head_and_says_so():
    model = _with_both_ends()
    model.resize_token_embeddings(120)
    with pytest.raises(StateError, match="lm_head"):
        model(**batch())
    with pytest.raises(StateError, match="lm_head"):
        gw.active(model)
    with pytest.raises(StateError, match="lm_head"):
        gw.merge(model)


def test_resizing_reads_and_writes_the_stored_embedding():
    model, bare = _with_both_ends(), llama()
    torch.manual_seed(1)
    model.resize_token_embeddings(120, mean_resizing=False)
    bare.resize_token_embeddings(120, mean_resizing=False)
    assert torch.equal(model.model.embed_tokens.weight[:99], bare.model.embed_tokens.weight[:99])


def test_detach_after_a_site_vanished_cleans_the_rest():
    model = _with_both_ends()
    model.resize_token_embeddings(120)
    gw.detach(model)
    assert all("_graft" not in module.__dict__ for module in model.modules())
    assert not any("grafts" in key.split(".") for key in model.state_dict())
    assert torch.isfinite(model(**batch()).logits).all()


def test_an_embedding_that_grew_is_told_of():
    model = llama(tie_word_embeddings=True)
    grafted(model, gw.LoRA(rank=2, workspaces=("embedding",)))
    model(**batch())
    model.resize_token_embeddings(120)
    with pytest.raises(StateError, match="embed_tokens"):
        model(**batch())


def test_a_replaced_layer_is_told_of():
    model = llama()
    grafted(model, gw.LoRA(rank=2, workspaces=PROJECTIONS))
    model(**batch())
    model.model.layers[1] = llama().model.layers[1]
    with pytest.raises(StateError, match=r"layers\.1"):
        model(**batch())
    with pytest.raises(StateError, match=r"layers\.1"):
        gw.active(model, "default")


def test_a_removed_layer_is_told_of():
    model = llama()
    grafted(model, gw.LoRA(rank=2, workspaces=PROJECTIONS))
    del model.model.layers[1]
    with pytest.raises(StateError, match=r"layers\.1"):
        model(**batch())


def test_a_file_is_not_written_without_its_sites(tmp_path):
    save = pytest.importorskip("graftwork.adapters.store").save
    model = _with_both_ends()
    model.resize_token_embeddings(120)
    with pytest.raises(GraftworkError, match="lm_head"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_ends_stay_tied():
    model = llama(tie_word_embeddings=True)
    grafted(model, gw.LoRA(rank=2, workspaces=("embedding",)))
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    head = model.lm_head.weight.clone()
    loss_of(model, batch()).backward()
    assert torch.equal(model.lm_head.weight, head)
    x = torch.randn(2, 32)
    torch.testing.assert_close(model.lm_head(x), x @ head.T)


def test_copies_notice_for_themselves():
    import copy

    model = _with_both_ends()
    twin = copy.deepcopy(model)
    model.resize_token_embeddings(120)
    assert torch.isfinite(twin(**batch()).logits).all()
    twin.lm_head = nn.Linear(32, 99)
    with pytest.raises(StateError, match="lm_head"):
        twin(**batch())


def test_a_head_in_a_classifier_that_is_replaced():
    model = tiny("bert-classification")
    grafted(model, gw.LoRA(rank=2))
    model.classifier = nn.Linear(32, 7)
    with pytest.raises(StateError, match="classifier"):
        model(**batch("bert"))
