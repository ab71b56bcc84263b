"""Training a reranker on pairs: hard negatives, pairs within a batch, the best adapter kept (Q-PEFT, section 3)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.optim import AdamW

from graftwork.data.ranking import Collection, Run, hard_negatives
from graftwork.engine.adapter import Adapter
from graftwork.errors import BadData, BadOption
from graftwork.tasks.reranking import LossForm, Reranker, ranking_loss

Triple = tuple[str, str, str]  # query, a passage that answers it, one that does not


@dataclass(frozen=True)
class Example:
    """A query, the passages that answer it, and hard negatives."""

    query: str
    answers: Sequence[str]
    negatives: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a reranker is trained.

    Args:
        steps: optimiser steps. rate, decay: of AdamW, at a constant rate.
        queries: drawn together; each one's answer is paired with the others' answers and with all hard negatives.
        pairs: in one step; what is left over at the end of the queries drawn is dropped.
        form, margin: of the loss.
        every, patience: steps between looks at the development loss, and looks without gain before it ends.
    """

    steps: int = 1000
    rate: float = 3e-2
    decay: float = 0.01
    queries: int = 4
    pairs: int = 2
    form: LossForm = "pairwise-v2"
    margin: float = 0.0
    every: int = 100
    patience: int = 5

    def __post_init__(self) -> None:
        least = {"steps": 1, "queries": 1, "pairs": 1, "every": 1, "patience": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise BadOption(f"reranking: {name}={getattr(self, name)} must be at least {low}")


def examples_of(collection: Collection, run: Run, negatives: int = 1) -> list[Example]:
    """An example for each query that has an answer, with its highest wrong passages of a run; BadData without one."""
    hard = hard_negatives(run, collection, negatives)
    texts = collection.passages
    made = [
        Example(text, [texts[n] for n in answers], [texts[n] for n in hard.get(name, ())])
        for name, text in collection.queries.items()
        if (answers := collection.relevant(name))
    ]
    if not made:
        raise BadData(f"{collection.origin}: no query has an answer to train on")
    return made


def in_batch_pairs(examples: Sequence[Example], rng: random.Random) -> list[Triple]:
    """Each query's answer beside every other query's answer and every hard negative that is no answer of its own."""
    drawn = [
        (
            example,
            rng.choice(example.answers),
            rng.choice(example.negatives) if example.negatives else None,
        )
        for example in examples
    ]
    hard = [negative for _, _, negative in drawn if negative is not None]
    return [
        (example.query, answer, other)
        for number, (example, answer, _) in enumerate(drawn)
        for other in [*(a for n, (_, a, _) in enumerate(drawn) if n != number), *hard]
        if other not in example.answers
    ]


def batches(examples: Sequence[Example], schedule: Schedule, seed: int) -> Iterator[list[Triple]]:
    """Pairs for one step after another, without end: queries in a new order each time round; BadData for too few."""
    rng, made = random.Random(seed), 0
    while True:
        order, before = rng.sample(examples, len(examples)), made
        for start in range(0, len(order), schedule.queries):
            pairs = in_batch_pairs(order[start : start + schedule.queries], rng)
            rng.shuffle(pairs)
            for first in range(0, len(pairs) - schedule.pairs + 1, schedule.pairs):
                made += 1
                yield pairs[first : first + schedule.pairs]
        if made == before:
            raise BadData(
                f"reranking: {len(examples)} examples, {schedule.queries} at a time, give no {schedule.pairs} pairs of "
                "an answer and a passage that is none; give negatives, or draw more queries together"
            )


def train_reranker(
    reranker: Reranker,
    adapter: Adapter,
    examples: Sequence[Example],
    development: Sequence[Triple],
    schedule: Schedule,
    seed: int = 0,
) -> list[tuple[int, float]]:
    """Train an adapter and leave it as it was at its lowest development loss.

    Returns the development losses by step. Raises BadData where too few pairs can be made of the examples.
    """
    optimizer = AdamW(adapter.parameters(), lr=schedule.rate, weight_decay=schedule.decay)
    curve = [(0, development_loss(reranker, development, schedule))]
    best = {name: tensor.detach().clone() for name, tensor in adapter.named_parameters()}
    since, source = 0, batches(examples, schedule, seed)
    for step in range(1, schedule.steps + 1):
        reranker.model.train()
        _step(reranker, next(source), schedule)
        optimizer.step()
        optimizer.zero_grad()
        if step % schedule.every and step != schedule.steps:
            continue
        found = development_loss(reranker, development, schedule)
        since = 0 if found < min(loss for _, loss in curve) else since + 1
        curve.append((step, found))
        if not since:
            best = {name: tensor.detach().clone() for name, tensor in adapter.named_parameters()}
        if since > schedule.patience:
            break
    for name, tensor in adapter.named_parameters():
        tensor.data.copy_(best[name])
    reranker.model.eval()
    return curve


def development_loss(reranker: Reranker, triples: Sequence[Triple], schedule: Schedule) -> float:
    """The training loss of pairs, without dropout."""
    queries = [query for query, _, _ in triples]
    positive = reranker.scores(queries, [answer for _, answer, _ in triples])
    negative = reranker.scores(queries, [other for _, _, other in triples])
    losses = [-torch.tensor(scores) for scores in (positive, negative)]
    return float(ranking_loss(losses[0], losses[1], schedule.form, schedule.margin))


def _step(reranker: Reranker, pairs: Sequence[Triple], schedule: Schedule) -> None:
    """Backward of one step: positives and negatives of its pairs in one forward."""
    queries = [query for query, _, _ in pairs for _ in range(2)]
    losses = reranker.losses(queries, [passage for _, *both in pairs for passage in both])
    ranking_loss(losses[0::2], losses[1::2], schedule.form, schedule.margin).backward()
