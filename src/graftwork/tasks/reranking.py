"""Reranking by query likelihood: a passage is as good as the query is likely behind it (Q-PEFT, arXiv:2404.04522).

    reranker = Reranker(model, tokenizer)                # a causal language model, with an adapter or without
    better = reranker.rerank(bm25(passages, queries, 20), collection)
    ranking_scores(better, collection.judgments)         # graftwork.tasks.ranking_scores

The score of passage d for query q is (1 / |q'|) Σ_t log p(q'_t | instruction, d, q'_<t), with q' the query between the
tokenizer's start and end marks. Scores compare passages of one query under one model only. Where an adapter reads
hints (QueryPrompt) it is told query, passage and place of each pair.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.data.ranking import Collection, Run, ranked
from graftwork.engine.verbs import hints, reads_hints
from graftwork.errors import BadData, BadOption
from graftwork.reference.technique import AtLeast, check_options
from graftwork.tasks.base import IGNORED

LossForm = Literal["pairwise-v2", "pairwise", "pointwise"]


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a pair becomes a text: [start] instruction, passage, question | [start] query [end].

    Args:
        instruction, passage, question: texts; the passage follows the second, the query the third.
        place: hints go in front of the question ("suffix", as in the published runs) or behind the instruction
            ("prefix").
        max_length: tokens without hints; a passage that is too long loses its beginning, as published.
        left_out: tokens of passages that hints are not made of, unless no other is left; special tokens never are.
    """

    name = "reranking"  # what messages call it

    instruction: str = "given the hints, please generate a question for the input passage"
    passage: str = "\nPassage: "
    question: str = "\nQuestion:\n"
    place: Literal["suffix", "prefix"] = "suffix"
    max_length: Annotated[int, AtLeast(8)] = 300
    left_out: tuple[Literal["stop-words", "no-letters"], ...] = ()

    def __post_init__(self) -> None:
        check_options(self)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Pair:
    """One query and one passage as tokens.

    Attributes:
        context, target: what is given and what is scored.
        position: tokens of the context in front of hints.
        query, passage: the tokens that hints are made of, the latter with what may be chosen.
    """

    context: Sequence[int]
    target: Sequence[int]
    position: int
    query: Sequence[int]
    passage: Sequence[int]
    shown: Sequence[bool]

    def __len__(self) -> int:
        return len(self.context) + len(self.target)


@dataclass(frozen=True)
class PairBatch:
    """Pairs as tensors, padded on the left.

    Attributes:
        inputs: input_ids and attention_mask (B, T). labels: (B, T), IGNORED outside the query.
        query, passage: input_ids and attention_mask for hints. position: (B,).
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    query: Mapping[str, Tensor]
    passage: Mapping[str, Tensor]
    position: Tensor


class Reranker:
    """A causal language model that ranks passages.

    Args:
        model: with a head over the vocabulary; adapters that are active take part.
        tokenizer: of the model.
        batch: pairs per forward when scoring.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, template: Template | None = None, *, batch: int = 32
    ) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.template = template or Template()
        self._hidden = _hidden_tokens(tokenizer, self.template.left_out)

    def pair(self, query: str, passage: str) -> Pair:
        """BadData for a query or passage without a token, BadOption where nothing of the passage has room."""
        ids, template = self._ids, self.template
        start, end = _mark(self.tokenizer.bos_token_id), _mark(self.tokenizer.eos_token_id)
        asked, given = ids(query), ids(passage)
        for what, text, found in (("query", query, asked), ("passage", passage, given)):
            if not found:
                raise BadData(f"reranking: {what} {text!r} has no token")
        front = start + ids(template.instruction)
        lead, tail, target = ids(template.passage), ids(template.question), start + asked + end
        room = template.max_length - len(front) - len(lead) - len(tail) - len(target)
        if room < 1:
            raise BadOption(
                f"max_length={template.max_length} leaves no room for a passage beside the query {query!r} of "
                f"{len(asked)} tokens and the template; raise it"
            )
        given = given[-room:]
        context = front + lead + given + tail
        position = len(context) - len(tail) if template.place == "suffix" else len(front)
        shown = [one not in self._hidden for one in given]
        return Pair(context, target, position, asked, given, shown if any(shown) else [True] * len(given))

    def collate(self, pairs: Sequence[Pair]) -> PairBatch:
        """Pairs on the model's device."""
        fill = _mark(self.tokenizer.pad_token_id) or [0]
        device = next(self.model.parameters()).device
        whole = [[*pair.context, *pair.target] for pair in pairs]
        labels = [[IGNORED] * len(pair.context) + list(pair.target) for pair in pairs]
        return PairBatch(
            _encoding(whole, [[1] * len(row) for row in whole], fill[0], device),
            _left([list(row) for row in labels], IGNORED).to(device),
            _encoding([p.query for p in pairs], [[1] * len(p.query) for p in pairs], fill[0], device),
            _encoding([p.passage for p in pairs], [p.shown for p in pairs], fill[0], device),
            torch.tensor([pair.position for pair in pairs], device=device),
        )

    def losses(self, queries: Sequence[str], passages: Sequence[str]) -> Tensor:
        """(B,) mean negative log-likelihood of each query behind its passage, in nats; with gradients."""
        pairs = [self.pair(query, passage) for query, passage in zip(queries, passages, strict=True)]
        return query_losses(self.model, self.collate(pairs))

    @torch.no_grad()
    def scores(self, queries: Sequence[str], passages: Sequence[str]) -> list[float]:
        """Mean log-likelihood of each query behind its passage, in evaluation mode."""
        pairs = [self.pair(query, passage) for query, passage in zip(queries, passages, strict=True)]
        order = sorted(range(len(pairs)), key=lambda n: len(pairs[n]))
        found = [0.0] * len(pairs)
        training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), self.batch):
                numbers = order[start : start + self.batch]
                losses = query_losses(self.model, self.collate([pairs[n] for n in numbers]))
                for n, loss in zip(numbers, losses.tolist(), strict=True):
                    found[n] = -loss
        finally:
            self.model.train(training)
        return found

    def rerank(self, run: Run, collection: Collection) -> Run:
        """The passages of each query of a run, from the most to the least likely; BadData for an unknown name."""
        names = [(query, passage) for query, passages in run.items() for passage, _ in passages]
        for query, passage in names:
            if query not in collection.queries or passage not in collection.passages:
                raise BadData(
                    f"{collection.origin} has not both query {query!r} and passage {passage!r} of the run"
                )
        found = self.scores(
            [collection.queries[query] for query, _ in names],
            [collection.passages[passage] for _, passage in names],
        )
        scores: dict[str, dict[str, float]] = {query: {} for query in run}
        for (query, passage), score in zip(names, found, strict=True):
            scores[query][passage] = score
        return {query: ranked(of) for query, of in scores.items()}

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def query_losses(model: nn.Module, batch: PairBatch) -> Tensor:
    """(B,) mean cross-entropy of the labels of each row, in nats."""
    with _told(model, batch):
        logits = model(**batch.inputs).logits
    longest = int((batch.labels != IGNORED).sum(1).max())
    labels = batch.labels[:, -longest:]
    logits = logits[:, -longest - 1 : -1].float()
    losses = functional.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
    return losses.sum(1) / (labels != IGNORED).sum(1)


def ranking_loss(
    positive: Tensor, negative: Tensor, form: LossForm = "pairwise-v2", margin: float = 0.0
) -> Tensor:
    """The loss of query losses (B,) under an answering passage, and under one that does not answer.

    pairwise-v2: mean(l+) + mean(max(0, l+ - l- + margin)); pairwise: the hinge alone, without margin; pointwise:
    mean(l+).
    """
    if form == "pointwise":
        return positive.mean()
    if form == "pairwise":
        return (positive - negative).relu().mean()
    return positive.mean() + (positive - negative + margin).relu().mean()


def _told(model: nn.Module, batch: PairBatch) -> AbstractContextManager[None]:
    if not reads_hints(model):
        return contextlib.nullcontext()
    return hints(model, query=batch.query, passage=batch.passage, position=batch.position)


def _mark(number: int | None) -> list[int]:
    return [] if number is None else [number]


def _left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*[value] * (longest - len(row)), *row] for row in rows])


def _encoding(
    rows: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], fill: int, device: torch.device
) -> dict[str, Tensor]:
    return {"input_ids": _left(rows, fill).to(device), "attention_mask": _left(masks, 0).long().to(device)}


def _hidden_tokens(tokenizer: Any, left_out: Sequence[str]) -> frozenset[int]:
    """Tokens that hints are not made of."""
    hidden = set(tokenizer.all_special_ids)
    if left_out:
        texts = {number: tokenizer.decode([number]).strip() for number in range(len(tokenizer))}
        if "no-letters" in left_out:
            hidden |= {n for n, text in texts.items() if not any(c.isalpha() for c in text)}
        if "stop-words" in left_out:
            from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

            hidden |= {n for n, text in texts.items() if text.lower() in ENGLISH_STOP_WORDS}
    return frozenset(hidden)
