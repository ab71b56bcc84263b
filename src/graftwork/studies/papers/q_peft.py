"""Q-PEFT: reranking with hints from query and passage, beside a fixed prompt (Peng et al. 2024, arXiv:2404.04522)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from graftwork.data.embedded import part_of, retrieval
from graftwork.data.ranking import Collection, Run, bm25, read_beir
from graftwork.engine.attach import attach
from graftwork.models.base import load_base
from graftwork.reference.technique import Technique
from graftwork.studies import stories
from graftwork.studies.cells import Cell, Measured
from graftwork.studies.findings import Column, Findings, Table, mean_table
from graftwork.studies.rates import best_rates, try_rates
from graftwork.studies.session import Session
from graftwork.studies.spread import difference
from graftwork.studies.study import Study
from graftwork.tasks.ranking_scores import ranking_scores
from graftwork.tasks.reranking import Reranker, Template
from graftwork.tasks.reranking_training import Schedule, Triple, examples_of, train_reranker
from graftwork.techniques.prompt_tuning import PromptTuning
from graftwork.techniques.query_prompt import QueryPrompt

BM25, BASE, FIXED = "BM25", "base", "fixed prompt"
RETRIEVAL, ATTENTION = "Q-PEFT retrieval", "Q-PEFT attention"
WORDS = QueryPrompt(length=15, embedding="copy", opening="hints: ", closing="\n")
ARMS: Mapping[str, Technique] = {
    FIXED: PromptTuning(length=15, init="vocabulary"),
    RETRIEVAL: WORDS,
    ATTENTION: replace(WORDS, form="attention"),
}
RATES = (1e-3, 1e-2)
LONGEST = 80  # characters of a summary line
DOCSTRINGS, XQUAD = "docstrings", "xquad-retrieval"
_KEPT: list[tempfile.TemporaryDirectory[str]] = []  # the prepared host stays for the life of the process


@dataclass(frozen=True)
class Plan:
    """Sizes: passages to choose from, their characters, candidates, queries of each part, optimiser steps."""

    passages: int
    characters: int
    candidates: int
    train: int
    chosen_by: int
    reported: int
    steps: int
    every: int


SMALL = Plan(
    passages=240, characters=240, candidates=15, train=80, chosen_by=16, reported=40, steps=60, every=20
)
FULL = Plan(
    passages=2000,
    characters=1000,
    candidates=100,
    train=320,
    chosen_by=128,
    reported=300,
    steps=20_000,
    every=1120,
)


@dataclass(frozen=True)
class Material:
    """Queries to train on, to choose by and to report, each with its candidates, and the host's folder or name."""

    host: str
    train: Collection
    train_run: Run
    chosen_by: Sequence[Triple]
    reported: Collection
    run: Run


def measure(session: Session) -> Findings:
    plan: Plan = session.pick(small=SMALL, full=FULL)
    found: dict[str, dict[str, list[Cell]]] = {}
    rates: dict[str, dict[str, float]] = {}
    for task, material in materials(session, plan).items():
        cell = partial(_cell, session, plan, task, material)
        still = {arm: cell(arm, session.seeds[0], 0.0) for arm in (BM25, BASE)}
        found[task] = {arm: [replace(one, seed=s) for s in session.seeds] for arm, one in still.items()}
        rates[task] = best_rates(try_rates(cell, dict.fromkeys(ARMS, RATES), session.seeds[0]))
        for arm, rate in rates[task].items():
            found[task][arm] = [cell(arm, seed, rate) for seed in session.seeds]
    return Findings(
        verdict=verdict(found),
        method=_method(plan, session.seeds[0]),
        tables=[_table(task, arms, rates[task]) for task, arms in found.items()],
    )


# Data


def materials(session: Session, plan: Plan) -> dict[str, Material]:
    """The docstrings, and XQuAD's paragraphs where they are present."""
    weights = session.data(stories.NAME)
    host = "tiny-llama" if weights is None else _prepared(weights)
    made = {DOCSTRINGS: _material(host, plan, *(_docstrings(part, plan) for part in _PARTS))}
    folder = session.data(XQUAD)
    if folder is not None:
        made[XQUAD] = _material(host, plan, *(_xquad(folder, part, plan) for part in _PARTS))
    return made


_PARTS = ("train", "validation", "test")


@lru_cache(maxsize=1)
def _prepared(weights: Path) -> str:
    _KEPT.append(tempfile.TemporaryDirectory())
    return str(stories.prepare(weights, Path(_KEPT[-1].name) / "stories260k"))


def _docstrings(part: str, plan: Plan) -> Collection:
    """Short summary lines as queries, bodies as passages; a part's passages are its own."""
    rows = retrieval(part)
    rows = rows.select([n for n, query in enumerate(rows["query"]) if len(query) <= LONGEST]).head(
        plan.passages
    )
    passages = {str(n): text[: plan.characters] for n, text in enumerate(rows["document"])}
    queries = {str(n): text for n, text in enumerate(rows["query"])}
    return Collection(passages, queries, {name: {name: 1} for name in queries}, f"{DOCSTRINGS}[{part}]")


def _xquad(folder: Path, part: str, plan: Plan) -> Collection:
    """Questions divided by a hash of their names, all over the same paragraphs."""
    whole = read_beir(folder)
    passages = {name: text[: plan.characters] for name, text in whole.passages.items()}
    cut = Collection(passages, whole.queries, whole.judgments, f"{XQUAD}[{part}]")
    return cut.of_queries(name for name in whole.queries if part_of(name, 0) == part)


def _material(
    host: str, plan: Plan, train: Collection, chosen_by: Collection, reported: Collection
) -> Material:
    sizes = (plan.train, plan.chosen_by, plan.reported)
    parts = [
        part.of_queries(list(part.queries)[:: max(1, len(part.queries) // size)][:size])
        for part, size in zip((train, chosen_by, reported), sizes, strict=True)
    ]
    runs = [bm25(part.passages, part.queries, plan.candidates) for part in parts]
    choice = [(e.query, e.answers[0], e.negatives[0]) for e in examples_of(parts[1], runs[1])]
    return Material(host, parts[0], runs[0], choice, parts[2], runs[2])


# One run


def _cell(
    session: Session, plan: Plan, task: str, material: Material, arm: str, seed: int, rate: float
) -> Cell:
    return session.cell(
        arm,
        task,
        seed,
        partial(MEASURES.get(arm, train), arm, seed, rate, plan, material),
        rate=rate,
        steps=plan.steps,
        candidates=plan.candidates,
        queries=len(material.reported.queries),
        host=Path(material.host).name,
    )


def as_given(arm: str, seed: int, rate: float, plan: Plan, material: Material) -> Measured:
    """The candidates in BM25's order."""
    return Measured(ranking_scores(material.run, material.reported.judgments))


def untrained(arm: str, seed: int, rate: float, plan: Plan, material: Material) -> Measured:
    model, tokenizer = load_base(material.host, task="causal-lm", pretrain=True)
    run = Reranker(model.eval(), tokenizer, Template(max_length=400)).rerank(material.run, material.reported)
    return Measured(ranking_scores(run, material.reported.judgments))


def train(arm: str, seed: int, rate: float, plan: Plan, material: Material) -> Measured:
    """Train an arm's adapter, and rerank with it."""
    model, tokenizer = load_base(material.host, task="causal-lm", pretrain=True)
    technique = ARMS[arm].tokenized(lambda text: tokenizer.encode(text, add_special_tokens=False))
    adapter = attach(model, technique, name="reranker")
    reranker = Reranker(model, tokenizer, Template(max_length=400))
    examples = examples_of(material.train, material.train_run)
    schedule = Schedule(steps=plan.steps, rate=rate, every=plan.every, margin=0.5)
    curve = train_reranker(reranker, adapter, examples, material.chosen_by, schedule, seed)
    run = reranker.rerank(material.run, material.reported)
    figures = ranking_scores(run, material.reported.judgments)
    figures["choice loss"] = min(loss for _, loss in curve)
    figures["parameters"] = sum(p.numel() for p in adapter.parameters())
    return Measured(figures, {"choice loss": curve})


MEASURES: Mapping[str, Callable[[str, int, float, Plan, Material], Measured]] = {
    BM25: as_given,
    BASE: untrained,
}


# What is said


def verdict(found: Mapping[str, Mapping[str, Sequence[Cell]]]) -> str:
    """Whether each form is clearly above the fixed prompt, the base and BM25 in MRR."""
    words = {1: "above", 0: "not told apart from", -1: "below"}
    pairs = [(task, form) for task in found for form in (RETRIEVAL, ATTENTION)]
    ahead = [difference(found[task][form], found[task][FIXED], "mrr").sign > 0 for task, form in pairs]
    sentences = [
        f"{task}, {form}: "
        + ", ".join(
            f"{words[difference(found[task][form], found[task][other], 'mrr').sign]} {other}"
            for other in (FIXED, BASE, BM25)
        )
        + "."
        for task, form in pairs
    ]
    start = "The claim appeared" if all(ahead) else "The claim was not seen"
    if any(ahead) and not all(ahead):
        start = f"The claim appeared in {sum(ahead)} of {len(ahead)} cases"
    return f"{start}: Q-PEFT over a fixed prompt, by MRR and its 95 % interval over seeds. " + " ".join(
        sentences
    )


def _table(task: str, arms: Mapping[str, Sequence[Cell]], rates: Mapping[str, float]) -> Table:
    columns = [Column(name, name) for name in ("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10")]
    shown = {arm: cells[:1] if arm in MEASURES else cells for arm, cells in arms.items()}
    table = mean_table(f"{task}: {arms[BM25][0].given['queries']} queries", shown, columns)
    rows = [
        [
            row[0],
            f"{rates[row[0]]:g}" if row[0] in rates else "",
            f"{round(arms[row[0]][0].figures.get('parameters', 0)):,}",
            *row[1:],
        ]
        for row in table.rows
    ]
    note = f"All arms rerank the same {arms[BM25][0].given['candidates']} candidates by BM25; the host is "
    headings = ["", "rate", "trained", *table.headings[1:]]
    return Table(table.title, headings, rows, [f"{note}{arms[BM25][0].given['host']}."])


def _method(plan: Plan, seed: int) -> str:
    return (
        f"A frozen causal language model scores each of {plan.candidates} passages (BM25's candidates, passages of "
        f"{plan.characters} characters) by the mean log-likelihood of the query behind it. Docstrings: summary "
        f"lines of at most {LONGEST} characters find bodies, parts without common functions; XQuAD: questions find "
        "paragraphs. Training: "
        f"{plan.train} queries, one hard negative by BM25 each, pairs within four queries as published, pairwise "
        f"loss with margin 0.5, at most {plan.steps} steps of two pairs by AdamW at a constant rate; the adapter with "
        f"the lowest loss on {plan.chosen_by} other queries is kept, and of the rates "
        f"{', '.join(f'{rate:g}' for rate in RATES)} the one where that loss is lowest with seed {seed}. Fixed prompt: "
        "15 positions at the front, from the vocabulary. Q-PEFT: 15 tokens, or one position for each query token, in "
        "front of the question, with a trained copy of the embedding and one hidden layer. The host knows stories for "
        "children and is far smaller than what the paper uses, so absolute figures say little; with this few queries "
        "only large differences show."
    )


STUDY = Study(
    name="q-peft",
    title="Hints from query and passage for reranking: Q-PEFT beside a fixed prompt",
    source="Peng et al. 2024, arXiv:2404.04522",
    claim="Prompts that depend on query and passage rerank better than the model alone and than one prompt for all, "
    "with either form, on all data sets and retrievers tried.",
    run=measure,
)
