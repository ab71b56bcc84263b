"""The four uses of adapter arithmetic, each measured for one technique and seed.

Adapters of one sum start from the same values, as in the paper's scripts: the seed is set anew before each.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.composition.methods import Concatenation
from graftwork.composition.search import grid, scored
from graftwork.composition.verbs import combine
from graftwork.engine.attach import attach, detach
from graftwork.engine.verbs import active
from graftwork.models.base import load_base
from graftwork.reference.catalogue import make
from graftwork.reference.properties import Port
from graftwork.reference.technique import Technique
from graftwork.studies.cells import Measured
from graftwork.studies.training import Labelled, MaskedWords, accuracy, fit, groups_of, sentence_loss

BLOCK, LENGTH, SAMPLES = 48, 96, 96
ALLOWED = 1.02  # of the clean perplexity while the weight is chosen; the claim allows 1.03


@dataclass(frozen=True)
class Corpus:
    """Sentences to train on, to choose weights by, to report."""

    name: str
    classes: tuple[str, str]
    train: Labelled
    chosen_by: Labelled
    reported: Labelled


@dataclass(frozen=True)
class Plan:
    """Sizes of a run."""

    rows: int
    chosen_by: int
    reported: int
    steps: int
    points: int


def technique(name: str) -> Technique:
    """LoRA of rank 8 on query and value, or (IA)3, as in the paper."""
    return make(name, {"rank": 8, "alpha": 8} if name == "lora" else {})


RATES = {"lora": 4e-3, "ia3": 2e-2}


# Distribution generalisation


def halves(labels: Sequence[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """Two halves of a task: the first takes 80 % of class 0 and is filled with others, the second is the rest."""
    order = list(range(len(labels)))
    rng.shuffle(order)
    zeros = [n for n in order if labels[n] == 0]
    others = [n for n in order if labels[n] != 0]
    taken = zeros[: round(0.8 * len(zeros))][: len(labels) // 2]
    first = taken + others[: len(labels) // 2 - len(taken)]
    chosen = set(first)
    return first, [n for n in order if n not in chosen]


def distribution(kind: str, corpus: Corpus, plan: Plan, seed: int) -> Measured:
    """Accuracy of adapters of each half, and of what is made of them at weights 0.5."""
    model, tokenizer = sentence_host(corpus.classes, seed)
    first, second = halves(corpus.train.labels, random.Random(seed))
    parts = {"first half": first, "second half": second}
    for name, numbers in parts.items():
        trained(model, tokenizer, kind, slug(name), corpus.train.part(numbers), plan.steps, seed)
    weights = {slug("first half"): 0.5, slug("second half"): 0.5}
    combine(model, weights, name=slug("sum of parameters"))
    names = [*parts, "sum of parameters"]
    if technique(kind).card.port is Port.WEIGHT:
        combine(model, weights, name=slug("sum of updates"), method=Concatenation())
        names.append("sum of updates")
    return Measured({name: on(model, slug(name), tokenizer, corpus.reported) for name in names})


# Multi-tasking


def multitask(kind: str, tasks: Sequence[Corpus], plan: Plan, seed: int) -> Measured:
    """Accuracy on two tasks of each adapter and of their mixture; every task is read by its own head."""
    model, tokenizer = sentence_host(("0", "1"), seed)
    one, two = (slug(task.name) for task in tasks)
    for task in tasks:
        trained(model, tokenizer, kind, slug(task.name), task.train, plan.steps, seed)

    def mixed(weight: float, part: str) -> list[float]:
        """Accuracies on both tasks."""
        found = []
        for task in tasks:
            combine(model, {one: weight, two: 1 - weight}, name="mixture", head=slug(task.name))
            found.append(on(model, "mixture", tokenizer, getattr(task, part)))
            detach(model, "mixture")
        return found

    search = grid(lambda weight: sum(mixed(weight, "chosen_by")) / 2, points=plan.points)
    figures = {"weight": search.best}
    for arm, weight in ((tasks[0].name, 1.0), (tasks[1].name, 0.0), ("mixture", search.best)):
        for task, value in zip(tasks, mixed(weight, "reported"), strict=True):
            figures[f"{arm} on {task.name}"] = value
    return Measured(figures, {"mean accuracy": list(search.tried)})


# Domain transfer


def transfer(kind: str, source: Corpus, target: Corpus, plan: Plan, seed: int) -> Measured:
    """Accuracy on the target of a classifier of the source, alone and moved by (target text - source text)."""
    model, tokenizer = sentence_host(source.classes, seed)
    words = word_head(model, tokenizer, [*source.train.texts, *target.train.texts], plan.steps, seed)
    trained(model, tokenizer, kind, "classifier", source.train, plan.steps, seed)
    for name, corpus in (("source-text", source), ("target-text", target)):
        torch.manual_seed(seed)
        adapter = attach(model, technique(kind), name=name, head=False)
        loss = words.loss_of(model, tokenizer, corpus.train.texts, seed)
        fit(model, groups_of(adapter, RATES[kind]), loss, lengths(corpus.train), steps=plan.steps, seed=seed)

    def moved(weight: float) -> Mapping[str, float]:
        return {"classifier": weight, "target-text": 1 - weight, "source-text": weight - 1}

    score = scored(model, moved, lambda host: accuracy(host, tokenizer, target.chosen_by))
    search = grid(score, 0.5, 1.0, plan.points)
    combine(model, moved(search.best), name="moved")
    names = {"source classifier": "classifier", "moved to the target": "moved"}
    figures = {label: on(model, name, tokenizer, target.reported) for label, name in names.items()}
    return Measured({**figures, "weight": search.best}, {"accuracy": list(search.tried)})


def word_head(model: nn.Module, tokenizer: Any, texts: Sequence[str], steps: int, seed: int) -> MaskedWords:
    """A head for masked words, trained with the encoder frozen."""
    torch.manual_seed(seed)
    head = MaskedWords(model.get_input_embeddings().weight)  # type: ignore[operator]
    frozen = model.requires_grad_(False)
    loss = head.loss_of(frozen, tokenizer, texts, seed)
    fit(
        frozen,
        [{"params": list(head.parameters()), "lr": 1e-3}],
        loss,
        [len(t) for t in texts],
        steps=steps,
        seed=seed,
    )
    return head.requires_grad_(False)


# Unlearning


@dataclass(frozen=True)
class Blocks:
    """Tokens (blocks, BLOCK) to train on, to choose the weight by, to report."""

    train: Tensor
    chosen_by: Tensor
    reported: Tensor


def unlearning(kind: str, folder: Path, plan: Plan, seed: int) -> Measured:
    """A small Llama that writes stories, with an adapter of stories that have direct speech, and with its negative."""
    model, tokenizer = load_base(str(folder), task="causal-lm")
    texts = written(model, tokenizer, 6 * SAMPLES, LENGTH, seed)
    clean = blocks(tokenizer, [text for text in texts if not in_style(text)])
    style = blocks(tokenizer, [text for text in texts if in_style(text)])
    torch.manual_seed(seed)
    groups = groups_of(attach(model, technique(kind), name="style"), RATES[kind])
    sizes = [BLOCK] * len(style.train)
    fit(model, groups, next_words_of(model, style.train), sizes, steps=plan.steps, seed=seed)
    with active(model):
        allowed = ALLOWED * perplexity(model, clean.chosen_by)

    def score(negated: nn.Module) -> float:
        """Perplexity of the style, as long as that of clean text stays near."""
        near = perplexity(negated, clean.chosen_by) <= allowed
        return perplexity(negated, style.chosen_by) if near else -math.inf

    search = grid(scored(model, lambda weight: {"style": -weight}, score), 0.0, 1.0, 2 * plan.points - 1)
    combine(model, {"style": -search.best}, name="negated")
    figures = {"weight": search.best}
    for arm, names in (("host", ()), ("adapter added", ("style",)), ("adapter negated", ("negated",))):
        with active(model, *names):
            new = written(model, tokenizer, 2 * SAMPLES, LENGTH, seed + 1000)
            figures |= {
                f"{arm}: clean perplexity": perplexity(model, clean.reported),
                f"{arm}: style perplexity": perplexity(model, style.reported),
                f"{arm}: texts in the style": sum(map(in_style, new)) / len(new),
            }
    return Measured(figures)


def in_style(text: str) -> bool:
    """Whether somebody speaks in it."""
    return '"' in text


def blocks(tokenizer: Any, texts: Sequence[str]) -> Blocks:
    """Texts one after another, cut into blocks: eight tenths, one, one."""
    stream = [number for ids in tokenizer(list(texts))["input_ids"] for number in ids]
    found = torch.tensor(stream[: len(stream) // BLOCK * BLOCK]).view(-1, BLOCK)
    first, second = len(found) * 8 // 10, len(found) * 9 // 10
    return Blocks(found[:first], found[first:second], found[second:])


def next_words(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean loss per token in nats."""
    return model(input_ids=rows, labels=rows).loss


def next_words_of(model: nn.Module, rows: Tensor) -> Callable[[Sequence[int]], Tensor]:
    """The loss of some of the rows."""
    return lambda numbers: next_words(model, rows[list(numbers)])


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor) -> float:
    """Of the next token in each block."""
    losses = [float(next_words(model, part)) * len(part) for part in rows.split(64)]
    return math.exp(sum(losses) / len(rows))


@torch.no_grad()
def written(model: Any, tokenizer: Any, count: int, length: int, seed: int) -> list[str]:
    """Texts that the model writes from nothing, drawn from all that it holds likely.

    Were the tail cut (top-p), an adapter of such texts would learn the cut before the style.
    """
    torch.manual_seed(seed)
    start = torch.full((count, 1), tokenizer.bos_token_id)
    drawn = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        max_new_tokens=length,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(drawn, skip_special_tokens=True)


# What the sentence tasks share


def sentence_host(classes: tuple[str, str], seed: int) -> tuple[Any, Any]:
    """MiniLM with a fresh head, and its tokenizer."""
    torch.manual_seed(seed)
    return load_base("minilm", task="text-classification", labels=list(classes))


def trained(model: Any, tokenizer: Any, kind: str, name: str, data: Labelled, steps: int, seed: int) -> None:
    """Attach an adapter, from the same start for the same seed, and train it on sentences."""
    torch.manual_seed(seed)
    adapter = attach(model, technique(kind), name=name)
    loss = sentence_loss(model, tokenizer, data)
    fit(model, groups_of(adapter, RATES[kind]), loss, lengths(data), steps=steps, seed=seed)


def lengths(data: Labelled) -> list[int]:
    """Of the sentences, in characters."""
    return [len(text) for text in data.texts]


def on(model: nn.Module, name: str, tokenizer: Any, data: Labelled) -> float:
    """Accuracy with one adapter."""
    with active(model, name):
        return accuracy(model, tokenizer, data)


def slug(label: str) -> str:
    """A label as an adapter's name."""
    return re.sub(r"\W+", "-", label)
