"""Context-PEFT: adapters chosen by what a token is, in a captioner that learns from few pictures (arXiv:2312.08900)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from graftwork.data.embedded import DIGITS, SENTENCES, digits
from graftwork.data.rows import Rows
from graftwork.engine.attach import attach
from graftwork.engine.verbs import adapters, route, trainable
from graftwork.models.base import load_base
from graftwork.models.captioner import Captioner, captioner
from graftwork.models.readers import ImageText
from graftwork.reference.technique import Technique
from graftwork.routing import ByToken
from graftwork.studies.cells import Cell, Measured
from graftwork.studies.findings import Column, Findings, Table, mean_table
from graftwork.studies.rates import best_rates, losses_table, try_rates
from graftwork.studies.session import Session
from graftwork.studies.spread import paired
from graftwork.studies.study import Study
from graftwork.tasks.captioning import Captioning, caption, caption_scores
from graftwork.techniques.fine_tuning import FineTuning
from graftwork.techniques.ia3 import IA3
from graftwork.techniques.lora import LoRA

RATES = (1e-3, 3e-3, 1e-2)
FULL_RATES = (3e-4, 1e-3, 3e-3)
BATCH = 16
PLACES = ("text.attention.*", "text.feedforward.up", "text.feedforward.gate", "text.feedforward.down")
VECTORS = ("text.attention.key", "text.attention.value", "text.feedforward.activation")


@dataclass(frozen=True)
class Plan:
    """Pictures to learn from, to choose the rate by and to report on; steps; rank of each context's LoRA."""

    learned: int
    chosen_by: int
    reported: int
    steps: int
    rank: int


SMALL = Plan(learned=200, chosen_by=100, reported=200, steps=150, rank=4)
ENTIRE = Plan(learned=1000, chosen_by=150, reported=250, steps=1500, rank=8)


@dataclass(frozen=True)
class Arm:
    """What is trained beside the connector: one adapter for each name; two names are contexts."""

    techniques: Mapping[str, Callable[[Plan], Technique]]
    rates: Sequence[float] = RATES


def _lora(factor: int) -> Callable[[Plan], Technique]:
    return lambda plan: LoRA(rank=factor * plan.rank, workspaces=PLACES)


def _vectors(plan: Plan) -> Technique:
    return IA3(workspaces=VECTORS)


def _everything(plan: Plan) -> Technique:
    return FineTuning(workspaces=(*PLACES, "text.norm", "text.norm.final"))


CONTEXT, SHARED, FULL = "Context-LoRA", "shared LoRA, twice the rank", "full fine-tuning"
ARMS: Mapping[str, Arm] = {
    "connector alone": Arm({}),
    CONTEXT: Arm({"text": _lora(1), "image": _lora(1)}),
    SHARED: Arm({"all": _lora(2)}),
    "Context-(IA)3": Arm({"text": _vectors, "image": _vectors}),
    "shared (IA)3": Arm({"all": _vectors}),
    FULL: Arm({"all": _everything}, FULL_RATES),
}


def run(session: Session) -> Findings:
    plan: Plan = session.pick(small=SMALL, full=ENTIRE)
    measure = partial(_cell, session, plan)
    first = session.seeds[0]
    searched = try_rates(measure, {name: arm.rates for name, arm in ARMS.items()}, first)
    best = best_rates(searched)
    cells = {name: [measure(name, seed, best[name]) for seed in session.seeds] for name in ARMS}
    return Findings(
        verdict=verdict(cells),
        method=_method(plan, first),
        tables=[_results(cells, best), losses_table(searched, first)],
    )


def _cell(session: Session, plan: Plan, name: str, seed: int, rate: float) -> Cell:
    given = {"rate": rate, "steps": plan.steps, "rank": plan.rank, "pictures": plan.learned}
    return session.cell(name, "digits", seed, partial(learn, ARMS[name], seed, rate, plan), **given)


# Data and model


@lru_cache(maxsize=8)
def pictures(part: str, count: int, seed: int) -> Rows:
    """Digits with a sentence each that names them."""
    rows, rng = digits(part), random.Random(seed)
    chosen = rows.select(sorted(rng.sample(range(len(rows)), min(count, len(rows)))))
    said = [rng.choice(SENTENCES).format(DIGITS[int(label)]) for label in chosen["label"]]
    return Rows(
        {"image": chosen["image"], "caption": said, "name": [DIGITS[int(n)] for n in chosen["label"]]}, part
    )


def host() -> tuple[Captioner, ImageText]:
    """The small vision transformer (which knows the digits 0 to 4) and the small Llama, with a fresh connector."""
    vision, images = load_base("tiny-vit", pretrain=True)
    language, tokenizer = load_base("tiny-llama", task="causal-lm", pretrain=True)
    model = captioner(vision, language)
    return model.requires_grad_(False), ImageText.of(model, tokenizer, images)


# One run


def learn(arm: Arm, seed: int, rate: float, plan: Plan) -> Measured:
    """Train the connector and the arm's adapters; figures on pictures that were kept aside."""
    model, both = host()
    torch.manual_seed(seed)  # the connector's start is the same for all arms
    bridge: Any = model.model.multi_modal_projector
    bridge.start(0.02)
    connector = list(bridge.requires_grad_().parameters())
    for name, make in arm.techniques.items():
        attach(model, make(plan), name=name, head=False)
    if arm.techniques:
        trainable(model, *arm.techniques)
    own = [p for adapter in adapters(model).values() for p in adapter.parameters()]
    with _routed(model, arm):
        _fit(model, both, [*connector, *own], rate, plan, seed)
        reported = pictures("test", plan.reported, 0)
        said = caption(model, reported["image"], both, max_new_tokens=16)
        figures = {
            "choice loss": loss(model, both, pictures("validation", plan.chosen_by, 0)),
            "loss": loss(model, both, reported),
            "named": sum(
                name in text.split() for name, text in zip(reported["name"], _bare(said), strict=True)
            )
            / len(said),
            "parameters": float(sum(p.numel() for p in own)),
            **caption_scores(said, reported["caption"]),
        }
    return Measured(figures)


def _bare(said: Sequence[str]) -> list[str]:
    return [text.lower().replace(".", " ") for text in said]


def _routed(model: Captioner, arm: Arm) -> AbstractContextManager[None]:
    if len(arm.techniques) < 2:
        return nullcontext()
    router = ByToken({model.config.image_token_id: 1}, other=0)
    return route(model, ["text", "image"], by=router)  # type: ignore[return-value]


def _fit(model: Any, both: ImageText, trained: Sequence[Tensor], rate: float, plan: Plan, seed: int) -> None:
    task = Captioning()
    encoded, collate = task.encode(pictures("train", plan.learned, seed), both), task.collator(both)
    items = [encoded[number] for number in range(len(encoded))]
    optimizer, rng = AdamW(trained, lr=rate, weight_decay=0.0), random.Random(seed)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / plan.steps))
    model.train()
    for _ in range(plan.steps):
        model(**collate(rng.sample(items, BATCH))).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def loss(model: Any, both: ImageText, rows: Rows) -> float:
    """Mean loss per token of the captions, in nats, over equally long batches."""
    task = Captioning()
    encoded, collate = task.encode(rows, both), task.collator(both)
    total, tokens = 0.0, 0
    for first in range(0, len(encoded), 2 * BATCH):
        batch = collate([encoded[number] for number in range(first, min(first + 2 * BATCH, len(encoded)))])
        count = int((batch["labels"] >= 0).sum())
        total, tokens = total + float(model(**batch).loss) * count, tokens + count
    return total / tokens


# What is said


def verdict(cells: Mapping[str, Sequence[Cell]]) -> str:
    """Whether Context-LoRA names more pictures than full fine-tuning, and than a shared LoRA of equal size."""
    against = {
        name: paired(cells[CONTEXT], cells[name], lambda cell: cell.figures["named"])
        for name in (FULL, SHARED)
    }
    words = {-1: "fewer pictures than", 0: "not clearly more or fewer pictures than", 1: "more pictures than"}
    appeared = {-1: "The claim did not appear", 0: "The claim was not seen clearly", 1: "The claim appeared"}
    share = cells[CONTEXT][0].figures["parameters"] / cells[FULL][0].figures["parameters"]
    full, shared = against[FULL], against[SHARED]
    return (
        f"{appeared[full.sign]}: Context-LoRA, with {share:.1%} of the parameters, names {words[full.sign]} full "
        f"fine-tuning on the same data (difference of the shares {full.spread.text()}), and {words[shared.sign]} one "
        f"LoRA of as many parameters for all tokens ({shared.spread.text()})."
    )


def _results(cells: Mapping[str, Sequence[Cell]], best: Mapping[str, float]) -> Table:
    columns = [
        Column("named rightly", "named", 3),
        Column("exact caption", "exact_match", 3),
        Column("loss, nats", "loss", 4),
    ]
    table = mean_table("Pictures kept aside", cells, columns)
    rows = [
        [row[0], f"{round(cells[row[0]][0].figures['parameters']):,}", f"{best[row[0]]:g}", *row[1:]]
        for row in table.rows
    ]
    return Table(table.title, ["", "adapter parameters", "rate", *table.headings[1:]], rows)


def _method(plan: Plan, seed: int) -> str:
    return (
        "A captioner of the project's two small hosts: a vision transformer that has learned the digits 0 to 4 (16 "
        "patches and two boundary vectors, 18 positions a picture) and a Llama that has read docstrings; the connector "
        f"is fresh, trained in every arm and not counted. {plan.learned} of scikit-learn's digits (0 to 9), each with "
        f"one of {len(SENTENCES)} sentences drawn at random that name it, so that an exact caption is partly luck and "
        f"naming the digit is not. {plan.steps} steps of {BATCH}, AdamW, ten steps of warm-up, linear decay, gradients "
        f"clipped at 1. Rank {plan.rank} for each context on all projections of the language model. The rate is the "
        f"best of three by the loss on {plan.chosen_by} other pictures with seed {seed}; figures are of "
        f"{plan.reported} more. The seed decides the pictures, their sentences, the starts of connector and adapters "
        "and the batches, alike for all arms. Full fine-tuning trains the layers of the language model, not its table."
    )


STUDY = Study(
    name="context-peft",
    title="Context-PEFT: adapters chosen by what a token is",
    source="Hadji-Kyriacou and Arandjelovic 2023, arXiv:2312.08900",
    claim="Adapters chosen by the domain of each token beat full fine-tuning of the language model on captioning under "
    "similar data constraints, with far fewer trainable parameters.",
    run=run,
)
