"""Natural GaLore beside GaLore and AdamW: pretraining a small Llama (Das 2024, arXiv:2410.16029)."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from graftwork.data.embedded import text
from graftwork.data.texts import read_text
from graftwork.models.vocabulary import train_tokenizer
from graftwork.optimizers.galore import GaLore
from graftwork.optimizers.groups import low_rank_groups
from graftwork.optimizers.memory import state_bytes
from graftwork.optimizers.natural_galore import NaturalGaLore
from graftwork.studies.cells import Cell, Measured
from graftwork.studies.findings import Column, Findings, Plot, Table, mean_curve, mean_table
from graftwork.studies.rates import best_rates, losses_table, try_rates
from graftwork.studies.session import Session
from graftwork.studies.spread import paired
from graftwork.studies.study import Study

VOCABULARY, LENGTH, BATCH = 512, 128, 8
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DAMPINGS = (0.1, 1.0, 10.0)
WARMUP, FLOOR = 0.1, 0.1  # shares of the steps and of the rate, as in GaLore's scripts
EVALUATIONS, ROUNDS = 6, 13
ADAMW, GALORE, NATURAL = "AdamW", "GaLore", "Natural GaLore"
GRADIENT = "forward and backward"


@dataclass(frozen=True)
class Plan:
    """Sizes of a run: the model's, the projection's, the training's."""

    width: int
    layers: int
    rank: int
    refresh: int
    steps: int
    evaluated: int  # blocks

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.width,
            intermediate_size=round(self.width * 8 / 3 / 8) * 8,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 16,
            num_key_value_heads=self.width // 32,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )


SMALL = Plan(width=96, layers=3, rank=24, refresh=50, steps=240, evaluated=128)
FULL = Plan(width=512, layers=8, rank=128, refresh=200, steps=10_000, evaluated=1_000)


@dataclass(frozen=True)
class Corpus:
    """Blocks of tokens (blocks, LENGTH) to train on, to choose the rate by, and to report."""

    name: str
    train: Tensor
    chosen_by: Tensor
    reported: Tensor


def run(session: Session) -> Findings:
    plan: Plan = session.pick(small=SMALL, full=FULL)
    corpus = read(session.data("wikitext-2"))
    measure = partial(_cell, session, plan, corpus)
    searched = try_rates(measure, dict.fromkeys(OPTIMIZERS, RATES), session.seeds[0])
    best = best_rates(searched)
    damped = min(DAMPED, key=lambda arm: searched[arm][best[arm]].figures["choice loss"])
    chosen = ADAMW, GALORE, NATURAL, damped
    cells = {arm: [measure(arm, seed, best[arm]) for seed in session.seeds] for arm in chosen}
    spent = session.cell(
        "update", corpus.name, session.seeds[0], partial(times, plan, corpus), **_sizes(plan)
    )
    return Findings(
        verdict=" ".join([verdict(cells, damped), *edges({arm: best[arm] for arm in chosen})]),
        method=_method(plan, corpus, session.seeds[0]),
        tables=[_results(cells, best, spent), losses_table(searched, session.seeds[0])],
        plots=[
            Plot(
                f"{corpus.name}, equal steps and rank",
                "step",
                "held-out perplexity",
                [mean_curve(arm, cells[arm], "perplexity") for arm in cells],
                log=True,
            )
        ],
    )


# Data


@lru_cache(maxsize=1)
def read(folder: Path | None) -> Corpus:
    """WikiText-2's validation file to train on (the last tenth to choose by) and its test file to report."""
    if folder is not None:
        name, train = "WikiText-2", read_text(folder / "valid.txt", False)["text"]
        reported = read_text(folder / "test.txt", False)["text"]
        cut = len(train) * 9 // 10
        train, chosen_by = train[:cut], train[cut:]
    else:
        name = "Docstrings of the standard library"
        train, chosen_by, reported = (text(part)["text"] for part in ("train", "validation", "test"))
    tokenizer = train_tokenizer(train, sentinels=False, size=VOCABULARY)
    return Corpus(name, *(blocks(tokenizer, part) for part in (train, chosen_by, reported)))


def blocks(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """(blocks, LENGTH): texts one after another, an end mark behind each; the rest is left out."""
    stream = [
        n
        for ids in tokenizer(list(texts), verbose=False)["input_ids"]
        for n in (*ids, tokenizer.eos_token_id)
    ]
    return torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH)


# Optimisers


def _adamw(model: LlamaForCausalLM, rate: float, plan: Plan) -> Optimizer:
    return AdamW(model.parameters(), lr=rate, eps=1e-6, weight_decay=0.0)


def _galore(model: LlamaForCausalLM, rate: float, plan: Plan) -> Optimizer:
    return GaLore(low_rank_groups(model, rank=plan.rank), lr=rate, refresh_interval=plan.refresh)


def _natural(
    model: LlamaForCausalLM, rate: float, plan: Plan, *, damping: float = 1e-3, clear_history: bool = False
) -> Optimizer:
    return NaturalGaLore(
        low_rank_groups(model, rank=plan.rank),
        lr=rate,
        refresh_interval=plan.refresh,
        damping=damping,
        clear_history=clear_history,
    )


DAMPED = {
    f"{NATURAL}, damping {damping:g}": partial(_natural, damping=damping, clear_history=True)
    for damping in DAMPINGS
}
OPTIMIZERS: Mapping[str, Callable[[LlamaForCausalLM, float, Plan], Optimizer]] = {
    ADAMW: _adamw,
    GALORE: _galore,
    NATURAL: _natural,
    **DAMPED,
}
TIMED = (ADAMW, GALORE, NATURAL)


# One run


def _cell(session: Session, plan: Plan, corpus: Corpus, arm: str, seed: int, rate: float) -> Cell:
    return session.cell(
        arm,
        corpus.name,
        seed,
        partial(pretrain, arm, seed, rate, plan, corpus),
        rate=rate,
        steps=plan.steps,
        **_sizes(plan),
    )


def _sizes(plan: Plan) -> dict[str, int]:
    return {"rank": plan.rank, "refresh": plan.refresh, "width": plan.width, "layers": plan.layers}


def pretrain(arm: str, seed: int, rate: float, plan: Plan, corpus: Corpus) -> Measured:
    """Train from scratch; figures at the end, held-out perplexity along the way."""
    model = LlamaForCausalLM(plan.config()).train()
    optimizer = OPTIMIZERS[arm](model, rate, plan)
    schedule = LambdaLR(optimizer, partial(factor, steps=plan.steps))
    rng, curve = random.Random(seed), []
    for step in range(1, plan.steps + 1):
        batch = corpus.train[rng.sample(range(len(corpus.train)), BATCH)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        model.zero_grad()
        if step % (plan.steps // EVALUATIONS) == 0:
            curve.append((step, math.exp(min(loss(model, corpus.chosen_by[: plan.evaluated // 2]), 20))))
    figures = {
        "choice loss": math.log(curve[-1][1]),
        "loss": loss(model, corpus.reported[: plan.evaluated]),
        "state bytes": state_bytes(optimizer)["total"],
    }
    figures["perplexity"] = math.exp(min(figures["loss"], 20))
    return Measured(figures, {"perplexity": curve})


def times(plan: Plan, corpus: Corpus) -> Measured:
    """Median processor seconds of an update, the optimisers taking turns; steps that renew a basis are left out."""
    batch = corpus.train[:BATCH]
    models = {arm: LlamaForCausalLM(plan.config()).train() for arm in TIMED}
    optimizers = {arm: OPTIMIZERS[arm](model, RATES[0], plan) for arm, model in models.items()}
    spent: dict[str, list[float]] = {name: [] for name in (*TIMED, GRADIENT)}
    for _, (arm, model) in itertools.product(range(min(ROUNDS, plan.refresh)), models.items()):
        begun = time.process_time()
        model(input_ids=batch, labels=batch).loss.backward()
        ready = time.process_time()
        optimizers[arm].step()
        spent[arm].append(time.process_time() - ready)
        spent[GRADIENT].append(ready - begun)
        model.zero_grad()
    return Measured({name: statistics.median(values[1:]) for name, values in spent.items()})


def factor(step: int, steps: int) -> float:
    """Share of the highest rate: linear warm-up, cosine to a tenth."""
    warm = max(1, round(steps * WARMUP))
    if step < warm:
        return (step + 1) / warm
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def loss(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Mean loss per token in nats."""
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(BATCH)]
    model.train()
    return sum(losses) / len(rows)


# What is said


def verdict(cells: Mapping[str, Sequence[Cell]], damped: str) -> str:
    """Whether Natural GaLore ends lower than GaLore, where AdamW is, and what the history costs."""
    natural, full, tuned = (
        paired(cells[one], cells[other], lambda cell: cell.figures["loss"])
        for one, other in ((NATURAL, GALORE), (NATURAL, ADAMW), (damped, GALORE))
    )
    words = {-1: "lower than", 0: "not clearly different from", 1: "higher than"}
    sizes = {arm: cells[arm][0].figures["state bytes"] for arm in cells}
    appeared = {-1: "The claim appeared", 0: "The claim was not seen clearly", 1: "The claim did not appear"}
    return (
        f"As published. {appeared[natural.sign]}: at equal steps and rank Natural GaLore's loss is "
        f"{words[natural.sign]} GaLore's, by {natural.spread.text()} nats (negative is better), and "
        f"{words[full.sign]} AdamW's, by {full.spread.text()}. With more damping and the history forgotten at each "
        f"renewal ({damped.removeprefix(f'{NATURAL}, ')}, the best of {len(DAMPINGS)} tried) it is "
        f"{words[tuned.sign]} GaLore's, by {tuned.spread.text()}. Its optimiser state is "
        f"{sizes[NATURAL] / sizes[GALORE]:.2f} times GaLore's and {sizes[NATURAL] / sizes[ADAMW]:.2f} times AdamW's, "
        "so 'the memory of GaLore' does not hold: the history is what is new in it."
    )


def edges(best: Mapping[str, float]) -> list[str]:
    """A sentence where a rate was chosen at the end of those tried, which may undersell that optimiser."""
    ends = {min(RATES): "lowest", max(RATES): "highest"}
    found = [f"{arm}'s best rate is the {ends[rate]} tried" for arm, rate in best.items() if rate in ends]
    return [f"{'; '.join(found)}: it may do better beyond."] if found else []


def _results(cells: Mapping[str, Sequence[Cell]], best: Mapping[str, float], spent: Cell) -> Table:
    table = mean_table(
        "After the last step",
        cells,
        [
            Column("test perplexity", "perplexity", 2),
            Column("test loss, nats", "loss", 4),
        ],
    )
    rows = [
        [
            arm,
            f"{best[arm]:g}",
            *means,
            f"{round(cells[arm][0].figures['state bytes']):,}",
            f"{spent.figures[NATURAL if arm in DAMPED else arm] * 1e3:.1f}",
        ]
        for arm, *means in table.rows
    ]
    headings = ["", "rate", *table.headings[1:], "optimiser state, bytes", "update, ms"]
    note = (
        "Processor time of an update that renews no basis, the median of turns taken in one process; forward and "
        f"backward before it take {spent.figures[GRADIENT] * 1e3:.0f} ms. A renewal costs an SVD of each matrix more."
    )
    return Table(table.title, headings, rows, [note])


def _method(plan: Plan, corpus: Corpus, seed: int) -> str:
    count = LlamaForCausalLM(plan.config()).num_parameters()
    held_out, tried = corpus.chosen_by[: plan.evaluated // 2].numel(), ", ".join(f"{d:g}" for d in DAMPINGS)
    return (
        f"A Llama of {count:,} parameters ({plan.layers} layers, width {plan.width}, {VOCABULARY} tokens made from the "
        f"training text), from scratch, {plan.steps} steps of {BATCH} x {LENGTH} tokens. {corpus.name}: "
        f"{corpus.train.numel():,} tokens to train on, {held_out:,} held out to choose the rate and to draw the curve, "
        f"{corpus.reported[: plan.evaluated].numel():,} of the test part for the figures. Matrices "
        f"of the layers are projected to rank {plan.rank}, the basis renewed every {plan.refresh} steps, scale 0.25; "
        "the other tensors follow AdamW at the same rate. Warm-up over a tenth of the steps, cosine to a tenth, no "
        "weight decay, no clipping, eps 1e-6. Natural GaLore as published: damping 1e-3, 20 gradients of history, kept "
        f"when the basis is renewed. Beside it, out of {tried}, the damping with the lowest held-out loss, and the "
        f"history forgotten when the basis is renewed. The rate is the best of the same {len(RATES)} for each "
        f"optimiser, by the held-out loss with seed {seed}. The seed decides start and batches, alike for all."
    )


STUDY = Study(
    name="natural-galore",
    title="Natural GaLore beside GaLore and AdamW: pretraining a small Llama",
    source="Das 2024, arXiv:2410.16029 (Natural GaLore); Zhao et al. 2024, arXiv:2403.03507 (GaLore)",
    claim="At equal steps and rank, the natural gradient gives Natural GaLore a lower validation perplexity than "
    "GaLore, near that of AdamW on all weights (C4, 130M parameters: log-perplexity 3.22 against 3.24 and 3.22), with "
    "the memory of GaLore.",
    run=run,
)
