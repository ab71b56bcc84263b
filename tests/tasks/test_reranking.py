"""Reranking by query likelihood: scores, losses, pairs, formats and metrics against hand counts and references."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

import graftwork as gw
from graftwork.data.ranking import (
    Collection,
    bm25,
    hard_negatives,
    ranked,
    read_beir,
    read_judgments,
    read_run,
    write_run,
)
from graftwork.errors import BadData, BadOption
from graftwork.tasks.ranking_scores import ranking_scores
from graftwork.tasks.reranking import IGNORED, Reranker, Template, query_losses, ranking_loss
from graftwork.tasks.reranking_training import (
    Example,
    Schedule,
    batches,
    examples_of,
    in_batch_pairs,
    train_reranker,
)
from graftwork.testing import tiny

TEMPLATE = Template(instruction="ask", passage="p:", question="q:", max_length=60)
PASSAGES = {"a": "the cat sat on the mat", "b": "a dog ran", "c": "stones fall down", "d": "the sun is hot"}
QUERIES = {"1": "cat mat", "2": "dog", "3": "sun"}
JUDGMENTS = {"1": {"a": 1, "b": 0}, "2": {"b": 2, "a": 1}, "3": {"d": 1}}


class Letters:
    """A tokenizer of letters: padding 0, start 1, end 2."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2
    all_special_ids = (0, 1, 2)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 90 for c in text]}

    def __len__(self) -> int:
        return 99

    def decode(self, ids: list[int]) -> str:
        return next((chr(c) for c in range(32, 122) if 3 + c % 90 == ids[0]), "")


def collection() -> Collection:
    return Collection(PASSAGES, QUERIES, JUDGMENTS)


def reranker(**options: Any) -> Reranker:
    torch.manual_seed(0)
    model = tiny("llama")
    if options:
        gw.attach(model, gw.QueryPrompt(**options), name="q")
    return Reranker(model, Letters(), TEMPLATE, batch=3)


def test_a_score_is_the_mean_log_likelihood_of_start_query_end():
    made = reranker()
    pair = made.pair("dog", "a dog ran")
    ids = torch.tensor([[*pair.context, *pair.target]])
    assert list(pair.target) == [1, *Letters()("dog")["input_ids"], 2]
    assert list(pair.context) == [1, *Letters()("askp:a dog ranq:")["input_ids"]]
    with torch.no_grad():
        log_p = made.model(ids).logits[0].double().log_softmax(-1)
    start = len(pair.context)
    expected = np.mean([float(log_p[start + n - 1, token]) for n, token in enumerate(pair.target)])
    assert made.scores(["dog"], ["a dog ran"])[0] == pytest.approx(expected, abs=1e-5)


def test_check_5_loss_toy_and_satisfied_pairs_give_no_gradient():
    positive, negative = torch.tensor([1.2, 0.8]), torch.tensor([1.5, 0.6])
    assert float(ranking_loss(positive, negative)) == pytest.approx(1.1)
    assert float(ranking_loss(positive, negative, margin=0.7)) == pytest.approx(1.65)
    assert float(ranking_loss(positive, negative, "pointwise")) == pytest.approx(1.0)
    assert float(ranking_loss(positive, negative, "pairwise", margin=9.0)) == pytest.approx(0.1)
    positive.requires_grad_()
    ranking_loss(positive, negative, "pairwise").backward()
    assert positive.grad.tolist() == [0.0, 0.5]
    assert [n for n, _ in ranked({0: -2.1, 1: -0.9, 2: -1.4})] == [1, 2, 0]


def test_check_6_labels_cover_the_query_whatever_the_hints():
    made = reranker()
    pairs = [made.pair(query, PASSAGES["a"]) for query in ("dog", "a longer query")]
    batch = made.collate(pairs)
    assert (batch.labels != IGNORED).sum(1).tolist() == [5, 16]
    for pair, ids, labels, mask in zip(
        pairs, batch.inputs["input_ids"], batch.labels, batch.inputs["attention_mask"], strict=True
    ):
        assert labels[labels != IGNORED].tolist() == list(pair.target) == ids[-len(pair.target) :].tolist()
        assert ids[mask != 0].tolist() == [*pair.context, *pair.target]


def test_hints_stand_in_front_of_the_question_or_behind_the_instruction():
    pair = reranker().pair("dog", "a dog ran")
    assert list(pair.context[pair.position :]) == Letters()("q:")["input_ids"]
    front = Reranker(tiny("llama"), Letters(), Template(**{**TEMPLATE.__dict__, "place": "prefix"}))
    pair = front.pair("dog", "a dog ran")
    assert list(pair.context[: pair.position]) == [1, *Letters()("ask")["input_ids"]]


@pytest.mark.parametrize("options", [{}, {"form": "retrieval", "length": 3}, {"form": "attention"}])
def test_check_8_a_score_is_a_mean_and_padding_does_not_change_it(options):
    made = reranker(**options)
    queries, passages = ["dog", "a cat on a mat", "sun"], [PASSAGES["a"], PASSAGES["b"], PASSAGES["d"]]
    together = made.scores(queries, passages)
    alone = [made.scores([query], [passage])[0] for query, passage in zip(queries, passages, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    batch = made.collate(
        [made.pair(query, passage) for query, passage in zip(queries, passages, strict=True)]
    )
    with torch.no_grad():
        assert (-query_losses(made.model.eval(), batch)).tolist() == pytest.approx(alone, abs=1e-5)
    run = made.rerank({"1": [("a", 0.0), ("b", 1.0), ("c", 2.0)]}, collection())
    losses = [-score for _, score in run["1"]]
    assert losses == sorted(losses)
    assert {name for name, _ in run["1"]} == {"a", "b", "c"}


def test_hints_are_given_pair_by_pair():
    made = reranker(form="retrieval", length=4)
    seen: list[Any] = []
    module = next(iter(gw.adapters(made.model)["q"].modules.values()))
    module.positions = lambda hints, plain=module.positions: (seen.append(hints), plain(hints))[1]
    made.scores(["dog", "sun"], [PASSAGES["b"], PASSAGES["d"]])
    ids = [row[mask].tolist() for row, mask in zip(seen[0].query, seen[0].query_mask, strict=True)]
    assert sorted(ids) == sorted(Letters()(query)["input_ids"] for query in ("dog", "sun"))


def test_a_long_passage_loses_its_beginning_and_a_query_without_room_is_refused():
    made = reranker()
    pair = made.pair("dog", "x" * 50 + "end")
    assert len(pair) == TEMPLATE.max_length
    assert list(pair.passage[-3:]) == Letters()("end")["input_ids"]
    with pytest.raises(BadOption, match="max_length=60 leaves no room"):
        made.pair("q" * 60, "passage")
    with pytest.raises(BadData, match="query '' has no token"):
        made.pair("", "passage")
    with pytest.raises(BadData, match="not both query '9'"):
        made.rerank({"9": [("a", 1.0)]}, collection())


def test_left_out_tokens_are_hidden_unless_nothing_else_is_left():
    template = Template(**{**TEMPLATE.__dict__, "left_out": ("no-letters",)})
    made = Reranker(tiny("llama"), Letters(), template)
    assert list(made.pair("dog", "a1b").shown) == [True, False, True]
    assert list(made.pair("dog", "123").shown) == [True, True, True]


def test_pairs_within_a_batch_are_the_published_ones():
    examples = [Example(f"q{n}", [f"p{n}"], [f"n{n}"]) for n in range(4)]
    pairs = in_batch_pairs(examples, random.Random(0))
    assert len(pairs) == 28
    expected = {f"p{n}" for n in (0, 1, 3)} | {f"n{n}" for n in range(4)}
    assert {other for query, _, other in pairs if query == "q2"} == expected
    shared = [Example("q0", ["p"], ["n"]), Example("q1", ["p"], ["p2"])]
    assert all(other != "p" for _, _, other in in_batch_pairs(shared, random.Random(0)))


def test_steps_drop_the_incomplete_tail_and_never_run_dry():
    examples = [Example(f"q{n}", [f"p{n}"], [f"n{n}"]) for n in range(4)]
    source = batches(examples, Schedule(pairs=3), seed=0)
    steps = [next(source) for _ in range(18)]
    assert all(len(step) == 3 for step in steps)
    assert {pair for step in steps[:9] for pair in step} <= set(in_batch_pairs(examples, random.Random(0)))
    with pytest.raises(BadData, match="give no 2 pairs"):
        next(batches([Example("q", ["p"], [])], Schedule(), seed=0))


@pytest.mark.parametrize("form", ["retrieval", "attention"])
def test_training_lowers_the_development_loss_and_keeps_the_best(form):
    made = reranker(form=form, length=3)
    adapter = gw.adapters(made.model)["q"]
    examples = examples_of(collection(), {q: [(p, 0.0) for p in PASSAGES] for q in QUERIES}, negatives=2)
    triples = [(e.query, e.answers[0], e.negatives[0]) for e in examples]
    base = {k: v.clone() for k, v in made.model.state_dict().items() if "grafts" not in k}
    curve = train_reranker(made, adapter, examples, triples, Schedule(steps=12, rate=1e-2, every=4), seed=1)
    best = min(loss for _, loss in curve)
    assert best < curve[0][1]
    positive = made.scores([q for q, _, _ in triples], [p for _, p, _ in triples])
    negative = made.scores([q for q, _, _ in triples], [n for _, _, n in triples])
    found = ranking_loss(-torch.tensor(positive), -torch.tensor(negative))
    assert float(found) == pytest.approx(best, abs=1e-5)
    assert all(torch.equal(made.model.state_dict()[k], v) for k, v in base.items())


def test_metrics_by_hand():
    run = {"1": [("x", 3.0), ("a", 2.0), ("b", 1.0)], "2": [("b", 1.0), ("c", 0.5)]}
    scores = ranking_scores(
        run, {"1": {"a": 1, "b": 1}, "2": {"b": 2, "z": 1}, "3": {"d": 1}, "4": {"d": 0}}, (1, 3)
    )
    assert scores["recall@1"] == pytest.approx((0 + 1 / 2 + 0) / 3)
    assert scores["recall@3"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert scores["hit@3"] == pytest.approx(2 / 3)
    assert scores["mrr"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    first = (1 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3))
    assert scores["ndcg@3"] == pytest.approx((first + 2 / (2 + 1 / math.log2(3))) / 3)
    with pytest.raises(BadData, match="no query has a relevant passage"):
        ranking_scores(run, {"1": {"a": 0}})
    with pytest.raises(BadOption, match="at least 1"):
        ranking_scores(run, JUDGMENTS, (0,))


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(-50, 50)), min_size=2, max_size=12, unique_by=lambda p: p[1]
    )
)
def test_ndcg_is_scikit_learn_s(pairs):
    grades = {str(n): grade for n, (grade, _) in enumerate(pairs)}
    if not any(grades.values()):
        return
    run = {"q": ranked({str(n): float(score) for n, (_, score) in enumerate(pairs)})}
    found = ranking_scores(run, {"q": grades}, (1, 5))
    for k in (1, 5):
        expected = ndcg_score([[g for g, _ in pairs]], [[s for _, s in pairs]], k=k)
        assert found[f"ndcg@{k}"] == pytest.approx(expected)


NAMES = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=6)
SCORES = st.dictionaries(NAMES, st.floats(-1e6, 1e6), min_size=1, max_size=5)
GRADES = st.dictionaries(NAMES, st.integers(-1, 3), min_size=1, max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.dictionaries(NAMES, SCORES, min_size=1, max_size=4))
def test_a_run_is_read_as_it_was_written(tmp_path, scores):
    run = {query: ranked(passages) for query, passages in scores.items()}
    write_run(tmp_path / "run.txt", run)
    assert read_run(tmp_path / "run.txt") == run


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.dictionaries(NAMES, GRADES, min_size=1, max_size=4))
def test_judgments_of_both_formats_read_the_same(tmp_path, judgments):
    rows = [(q, p, g) for q, grades in judgments.items() for p, g in grades.items()]
    trec, beir = tmp_path / "qrels.txt", tmp_path / "qrels.tsv"
    trec.write_text("".join(f"{q} 0 {p} {g}\n" for q, p, g in rows))
    beir.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{p}\t{g}\n" for q, p, g in rows))
    assert read_judgments(trec) == read_judgments(beir) == judgments


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.text(min_size=1, max_size=60))
def test_any_text_is_read_or_refused_with_its_place(tmp_path, text):
    file = tmp_path / "file.txt"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    for read in (read_run, read_judgments):
        try:
            read(file)
        except BadData as error:
            named = str(file) in str(error)
        else:
            named = True
        assert named


@pytest.mark.parametrize(
    "read, text, words",
    [
        (read_run, "1 Q0 a 1 2.0", "line 1: 5 fields; a line of a run has 6"),
        (read_run, "1 Q0 a 1 2.0 t\n1 Q0 a 2 1.0 t", "line 2: query '1' ranks passage 'a' twice"),
        (read_run, "1 Q0 a 1 nan t", "score 'nan' is not finite"),
        (read_run, "1 Q0 a 1 high t", "score 'high' is no number"),
        (read_judgments, "1 0 a 1\n1 0 a 1", "line 2: query '1' judges passage 'a' twice"),
        (read_judgments, "1 0 a yes", "grade 'yes' is no whole number"),
        (read_judgments, "1 0", "line 1: 2 fields"),
    ],
)
def test_broken_files_are_refused(tmp_path, read, text, words):
    (tmp_path / "file").write_text(text)
    with pytest.raises(BadData, match=words):
        read(tmp_path / "file")


def beir(folder: Path, key: str = "_id") -> Path:
    other = {"_id": ("_id", "_id"), "doc_id": ("doc_id", "query_id")}[key]
    passages = [{other[0]: n, "title": "t" if n == "a" else "", "text": text} for n, text in PASSAGES.items()]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, passages)))
    queries = [{other[1]: n, "text": text} for n, text in {**QUERIES, "9": "not judged"}.items()]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (folder / "qrels").mkdir()
    rows = [f"{q}\t{p}\t{g}" for q, grades in JUDGMENTS.items() for p, g in grades.items()]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]))
    return folder


@pytest.mark.parametrize("key", ["_id", "doc_id"])
def test_a_beir_folder(tmp_path, key):
    found = read_beir(beir(tmp_path, key))
    assert found.passages == {**PASSAGES, "a": f"t {PASSAGES['a']}"}
    assert found.queries == QUERIES
    assert found.judgments == JUDGMENTS
    assert found.relevant("1") == ["a"]
    assert list(found.of_queries(["2"]).judgments) == ["2"]


def test_a_broken_beir_folder_is_refused(tmp_path):
    with pytest.raises(BadData, match=r"has no corpus.jsonl, queries.jsonl, qrels/test.tsv"):
        read_beir(tmp_path)
    folder = beir(tmp_path)
    good = (folder / "corpus.jsonl").read_text()
    for text, words in (
        ("{", "line 1 is no JSON"),
        ("[1]", "line 1 is a list"),
        ('{"_id": "a"}', "line 1 has no 'text'"),
        ('{"_id": 1, "text": "x"}', "'_id' is a int"),
        (f"{good}\n{good}", "'a' is there twice"),
        ('{"_id": "a", "text": "x"}', "judges 'b', which is no passage"),
    ):
        (folder / "corpus.jsonl").write_text(text)
        with pytest.raises(BadData, match=words):
            read_beir(folder)
    with pytest.raises(BadOption, match="cannot stand in a TREC run"):
        write_run(tmp_path / "run", {"a b": [("c", 1.0)]})


def test_bm25_ranks_by_the_formula():
    pytest.importorskip("bm25s")
    run = bm25(PASSAGES, QUERIES, top=3)
    assert [run[q][0][0] for q in ("1", "2", "3")] == ["a", "b", "d"]
    # Lucene's form: idf = ln(1 + (N - n + 0.5) / (n + 0.5)), k1 = 1.5, b = 0.75; stop words do not count in lengths
    lengths = {"a": 3, "b": 2, "c": 3, "d": 2}
    mean = sum(lengths.values()) / 4
    idf = math.log(1 + (4 - 1 + 0.5) / (1 + 0.5))
    expected = 2 * idf / (1 + 1.5 * (1 - 0.75 + 0.75 * lengths["a"] / mean))
    assert run["1"][0][1] == pytest.approx(expected, rel=1e-5)
    assert hard_negatives(run, collection(), 2)["2"] == [n for n, _ in run["2"] if n not in ("a", "b")][:2]
    with pytest.raises(BadOption, match="top=9 of 4 passages"):
        bm25(PASSAGES, QUERIES, top=9)
