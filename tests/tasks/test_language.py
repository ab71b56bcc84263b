"""The three kinds of language modelling: what is in a block, what counts in the loss, what is masked."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import plain_tokenizer, word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from graftwork.data.rows import Rows
from graftwork.errors import BadData
from graftwork.tasks.base import IGNORED
from graftwork.tasks.masked_lm import Masker
from graftwork.tasks.registry import make_task

PLAIN = plain_tokenizer("a b c d e f")
BERT = word_tokenizer(" ".join(f"w{n}" for n in range(200)))
EOS = 0


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=9), min_size=1, max_size=6))
def test_blocks_joined_are_the_texts_with_end_marks(texts):
    rows = Rows({"text": [" ".join(text) for text in texts]})
    blocks = [
        item["input_ids"] for item in make_task("causal-lm", {"max_length": 4}).encode(rows, PLAIN).items
    ]
    stream = [token for text in texts for token in [*PLAIN(" ".join(text))["input_ids"], EOS]]
    assert all(2 <= len(block) <= 4 for block in blocks)
    if len(stream) % 4 == 1 and len(stream) > 1:  # a lone last token is preceded by the one before it
        assert blocks[-1] == stream[-2:]
        blocks[-1] = blocks[-1][1:]
    assert [token for block in blocks for token in block] == stream


def test_only_the_completion_counts_and_prompts_lose_their_beginning():
    rows = Rows({"prompt": ["a b c", "a"], "completion": ["d e", "b c d e f"]})
    task = make_task("causal-lm", {"max_length": 5})
    encoded = task.encode(rows, PLAIN)
    b, c, d, e, f = PLAIN("b c d e f")["input_ids"]
    assert encoded.items[0]["input_ids"] == [b, c, d, e, EOS]
    assert encoded.items[0]["labels"] == [IGNORED, IGNORED, d, e, EOS]
    assert encoded.items[1]["input_ids"][1:] == [b, c, d, e]
    assert (encoded.truncated, encoded.tokens_cut) == (2, 1 + 2)
    assert f not in encoded.items[1]["input_ids"]
    with pytest.raises(BadData, match="'text', or 'prompt' and 'completion'"):
        task.encode(rows.pick({"prompt": "prompt"}), PLAIN)


def test_perplexity_is_the_exponential_of_the_model_s_own_loss():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=7, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    rows = Rows({"prompt": ["a b c", "a"], "completion": ["d e", "b c d e f"]})
    task = make_task("causal-lm")
    batch = task.collator(PLAIN)(task.encode(rows, PLAIN).items)
    with torch.no_grad():
        output = model(**batch)
    kept = task.preprocess_logits((output.logits, "cache"), batch["labels"])
    scores = task.metrics(kept.numpy(), batch["labels"].numpy(), PLAIN)
    assert kept.shape == (*batch["labels"].shape, 2)
    assert scores["perplexity"] == pytest.approx(output.loss.exp().item(), rel=1e-5)


def test_perplexity_does_not_change_when_batches_are_joined_with_padding():
    task, rng = make_task("causal-lm"), np.random.default_rng(0)
    labels, scores = rng.integers(0, 5, (2, 6)), rng.random((2, 6, 2))
    padded = np.pad(labels, ((0, 0), (0, 3)), constant_values=IGNORED)
    wider = np.pad(scores, ((0, 0), (0, 3), (0, 0)), constant_values=IGNORED)
    assert task.metrics(wider, padded, None) == task.metrics(scores, labels, None)


def test_masks_follow_the_shares_and_spare_special_tokens():
    masker, generator = Masker(4, 205, tuple(range(5)), 0.15), torch.Generator().manual_seed(0)
    tokens = [2, *[5 + n % 200 for n in range(40_000)], 3]
    made = masker.mask(tokens, generator)
    before, after, labels = np.array(tokens), np.array(made["input_ids"]), np.array(made["labels"])
    chosen = labels != IGNORED
    assert not chosen[[0, -1]].any()
    assert (before[chosen] == labels[chosen]).all()
    assert (before[~chosen] == after[~chosen]).all()
    assert chosen.mean() == pytest.approx(0.15, abs=0.01)
    assert (after[chosen] == 4).mean() == pytest.approx(0.8, abs=0.02)
    assert (after[chosen] == before[chosen]).mean() == pytest.approx(0.1, abs=0.02)


def test_short_texts_have_one_masked_token_and_texts_of_special_tokens_none():
    masker = Masker(4, 205, tuple(range(5)), 0.0)
    assert sum(label != IGNORED for label in masker.mask([2, 9, 9, 3])["labels"]) == 1
    assert set(masker.mask([2, 3])["labels"]) == {IGNORED}


def test_evaluation_masks_stay_and_training_masks_change():
    rows = Rows({"text": [" ".join(f"w{n}" for n in range(100))]})
    task = make_task("masked-lm")
    collate = task.collator(BERT)
    fixed, fresh = task.encode(rows, BERT), task.encode(rows, BERT, training=True)
    again = task.encode(rows, BERT)
    torch.manual_seed(0)
    batches = [collate(fixed.items), collate(again.items), collate(fresh.items), collate(fresh.items)]
    assert torch.equal(batches[0]["labels"], batches[1]["labels"])
    assert not torch.equal(batches[2]["labels"], batches[3]["labels"])
    with pytest.raises(BadData, match="mask token"):
        task.encode(rows, PLAIN)


def test_targets_are_scored_as_texts():
    rows = Rows({"source": ["a b", "c"], "target": ["d e f a", "b"]})
    task = make_task("seq2seq", {"prefix": "e ", "max_target_length": 3, "beams": 2})
    encoded = task.encode(rows, PLAIN)
    assert [item["input_ids"] for item in encoded.items] == PLAIN(["e a b", "e c"])["input_ids"]
    assert (encoded.truncated, encoded.tokens_cut) == (1, 1)
    assert task.generation() == {"max_new_tokens": 3, "num_beams": 2}
    labels = np.array([PLAIN("d e f a")["input_ids"], [2, EOS, IGNORED, IGNORED]])
    assert task.metrics(labels, labels, PLAIN) == {
        "rouge_l": 1.0,
        "bleu": pytest.approx(1.0),
        "exact_match": 1.0,
    }
    worse = task.metrics(np.full_like(labels, 1), labels, PLAIN)
    assert (worse["bleu"], worse["exact_match"]) == (0.0, 0.0)
