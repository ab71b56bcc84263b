"""Metrics against hand-computed values, scikit-learn's curves and brute force."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.tasks.base import IGNORED
from graftwork.tasks.overlap import bleu, common_length, exact_match, rouge_l, words
from graftwork.tasks.scores import classification_scores, language_scores, regression_scores, token_scores
from graftwork.tasks.spans import is_span_scheme, span_scores, spans

FAST = settings(max_examples=60, deadline=None)


def test_classification_by_hand():
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 2])
    f1 = ((2 * 2 / (3 + 3)) + (2 * 1 / (2 + 2)) + 1.0) / 3
    counts = np.zeros((3, 3))
    np.add.at(counts, (labels, predicted), 1)
    true, said, right, total = counts.sum(1), counts.sum(0), np.trace(counts), counts.sum()
    matthews = (right * total - true @ said) / math.sqrt((total**2 - said @ said) * (total**2 - true @ true))
    scores = classification_scores(predicted, labels)
    assert scores == pytest.approx({"accuracy": 4 / 6, "macro_f1": f1, "matthews": matthews})


def test_regression_by_definition_and_constant_predictions():
    rng = np.random.default_rng(0)
    values, said = rng.normal(size=50), rng.normal(size=50).astype(np.float32)
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (said, values)]
    scores = regression_scores(said, values)
    assert scores["pearson"] == pytest.approx(np.corrcoef(said, values)[0, 1], abs=1e-6)
    assert scores["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-6)
    assert scores["rmse"] == pytest.approx(math.sqrt(sum((a - b) ** 2 for a, b in zip(said, values)) / 50))
    assert scores["mae"] == pytest.approx(sum(abs(a - b) for a, b in zip(said, values)) / 50)
    assert regression_scores(np.ones(5), values[:5])["pearson"] == 0.0
    assert regression_scores(np.ones(1), np.ones(1))["spearman"] == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_scores_agree_with_float64_cross_entropy(dtype):
    torch.manual_seed(0)
    logits, labels = (torch.randn(3, 7, 11) * 4).to(dtype), torch.randint(11, (3, 7))
    labels[0, :3] = labels[2] = IGNORED
    scores = token_scores(logits, labels)
    loss = torch.nn.functional.cross_entropy(logits.double().transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(scores[..., 0].double(), loss, atol=2e-5, rtol=1e-5)
    result = language_scores(scores.numpy(), labels.numpy())
    counted = labels != IGNORED
    assert result["perplexity"] == pytest.approx(math.exp(loss[counted].mean()), rel=1e-4)
    assert result["token_accuracy"] == pytest.approx(
        (logits.argmax(-1) == labels)[counted].double().mean().item()
    )


def test_perplexity_of_nothing_and_of_hopeless_models():
    assert math.isnan(language_scores(np.zeros((1, 2, 2)), np.full((1, 2), IGNORED))["perplexity"])
    assert language_scores(np.full((1, 1, 2), 1e4), np.zeros((1, 1)))["perplexity"] == math.inf


@FAST
@given(one=st.text("ab.", max_size=7), two=st.text("ab.", max_size=7))
def test_longest_common_subsequence_against_all_subsequences(one, two):
    def subsequences(text):
        return {
            tuple(text[i] for i in at)
            for n in range(len(text) + 1)
            for at in combinations(range(len(text)), n)
        }

    assert common_length(one, two) == max(map(len, subsequences(one) & subsequences(two)))


def test_rouge_by_hand():
    assert words("Don't STOP, 2 men!") == ["don", "'", "t", "stop", ",", "2", "men", "!"]
    precision, recall = 3 / 4, 3 / 6  # "the cat sat" of 4 and of 6 words
    assert rouge_l("the cat sat down", "the black cat sat over there") == pytest.approx(
        2 * precision * recall / (precision + recall)
    )
    assert (rouge_l("", ""), rouge_l("a", ""), rouge_l("A b", "a B")) == (1.0, 0.0, 1.0)
    assert exact_match("The  cat.", "the cat .")
    assert not exact_match("the cat", "a cat")


def test_bleu_by_hand():
    # 1-grams: the x2 (clipped), cat, is, on, mat of 7; 2-grams 4 of 6; 3-grams 2 of 5; 4-grams 1 of 4
    said, wanted = "the the cat is on the mat", "the cat is on a big mat there"
    grams = [(5, 7), (3, 6), (2, 5), (1, 4)]
    expected = math.exp(sum(math.log(a / b) for a, b in grams) / 4 + 1 - 8 / 7)
    assert bleu([said], [wanted]) == pytest.approx(expected)
    assert bleu([said], [said]) == pytest.approx(1.0)
    assert bleu(["a b"], ["a b"]) == 0.0  # no 4-gram
    long = said + " " + wanted
    two = bleu([said, long], [said, long])
    assert two == pytest.approx(1.0)


def test_spans_by_hand():
    tags = ["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "I-ORG", "I-ORG"]
    assert spans(tags) == {(0, 2, "PER"), (3, 4, "LOC"), (4, 5, "LOC"), (5, 7, "ORG")}
    assert spans(["I-PER", "B-PER", "I-LOC"]) == {(0, 1, "PER"), (1, 2, "PER"), (2, 3, "LOC")}
    scores = span_scores([tags], [["B-PER", "I-PER", "O", "B-LOC", "I-LOC", "O", "O"]])
    assert scores == pytest.approx({"span_precision": 1 / 4, "span_recall": 1 / 2, "span_f1": 2 / 6})
    assert span_scores([["O"]], [["O"]])["span_f1"] == 0.0
    assert is_span_scheme(("B-PER", "I-PER", "O"))
    assert not is_span_scheme(("NOUN", "O"))


@FAST
@given(st.lists(st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"]), max_size=8))
def test_spans_cover_exactly_the_tagged_words(tags):
    covered = sorted(n for start, end, _ in spans(tags) for n in range(start, end))
    assert covered == [n for n, tag in enumerate(tags) if tag != "O"]
