"""KaSA and BA-LoRA beside LoRA, PiSSA, DoRA and full fine-tuning, at equal rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from graftwork.studies.cells import Cell
from graftwork.studies.data_to_text import Generation, generation, overlap
from graftwork.studies.findings import Column, Findings, Plot, Table, mean_curve, mean_table
from graftwork.studies.orders import Pairs, pairs, summary, table
from graftwork.studies.rates import best_rates
from graftwork.studies.session import Session
from graftwork.studies.stories import NAME as STORIES
from graftwork.studies.study import Study
from graftwork.studies.tuned import Bed, Values, cell, rates_table, search

BODY = ["embedding", "embedding.*", "norm", "norm.final", "attention.*", "feedforward.*", "pooler"]
HEAD_RATE = 1e-2  # of the fresh head, whatever the rate of the rest: MiniLM's pooled features are small
TESTED = 234  # rows of a sentence task's test part, which is all of TREC's
CLASS_LIMIT = 5  # BA-LoRA's k, where there are classes enough

_KASA = (
    {"name": "singular-values", "weight": 1e-4, "averaged": True},
    {"name": "orthogonality", "weight": 1e-3, "averaged": True, "official": True},
)
_BA_TOKENS = (
    {"name": "consistency", "weight": 0.025, "temperature": 2, "schedule": "cosine"},
    {"name": "diversity", "weight": 0.005, "schedule": "two-phase"},
    {"name": "spectral-concentration", "weight": 0.005, "components": 10, "schedule": "two-phase"},
)


def _ba_classes(classes: int) -> tuple[Values, ...]:
    return (
        {"name": "consistency", "weight": 0.15},
        {"name": "diversity", "weight": 0.03},
        {
            "name": "spectral-concentration",
            "weight": 0.03,
            "components": min(CLASS_LIMIT, classes - 1),
        },
    )


@dataclass(frozen=True)
class Arm:
    """What is compared: a technique and the terms that belong to it, for classes and for tokens."""

    technique: Values
    classes: Callable[[int], Sequence[Values]] = lambda classes: ()
    tokens: Sequence[Values] = ()


FULL = "full fine-tuning"
ARMS = {
    "LoRA": Arm({"name": "lora"}),
    "PiSSA": Arm({"name": "lora", "init": "pissa"}),
    "DoRA": Arm({"name": "dora"}),
    "KaSA": Arm({"name": "kasa"}, lambda classes: _KASA, _KASA),
    "BA-LoRA": Arm({"name": "ba-lora"}, _ba_classes, _BA_TOKENS),
    FULL: Arm({"name": "fine-tuning"}),
}
ORDERS = (
    ("KaSA", "LoRA"),
    ("KaSA", "PiSSA"),
    ("KaSA", FULL),
    ("BA-LoRA", "LoRA"),
    ("BA-LoRA", "PiSSA"),
    ("BA-LoRA", FULL),
    ("PiSSA", "LoRA"),
    ("DoRA", "LoRA"),
)


@dataclass(frozen=True)
class Plan:
    """Sizes: rows and epochs of a sentence task, epochs of the generation task, ranks,
    references of each prompt to train on."""

    rows: int
    epochs: int
    generation_epochs: int
    references: int
    rank: int = 8
    generation_rank: int = 4


SMALL = Plan(rows=256, epochs=2, generation_epochs=1, references=2)
LARGE = Plan(rows=2400, epochs=5, generation_epochs=5, references=100)


def run(session: Session) -> Findings:
    plan: Plan = session.pick(small=SMALL, full=LARGE)
    told = generation(session.data(STORIES), session.data("e2e-nlg"), plan.references)
    beds = [*_sentence_beds(session, plan), _generation_bed(told, plan)]
    first, second, other = beds
    searched = {bed.name: search(session, bed, ARMS) for bed in (first, other)}
    rated_by = {first.name: first.name, second.name: first.name, other.name: other.name}
    best = {task: best_rates(searched[rater]) for task, rater in rated_by.items()}
    by_seed = {
        seed: {
            bed.name: {arm: cell(session, bed, arm, seed, best[bed.name][arm]) for arm in ARMS}
            for bed in beds
        }
        for seed in session.seeds
    }
    cells = {
        bed.name: {arm: [by_seed[seed][bed.name][arm] for seed in session.seeds] for arm in ARMS}
        for bed in beds
    }
    found = {bed.name: pairs(cells[bed.name], ORDERS) for bed in beds}
    return Findings(
        verdict=verdict(found, cells),
        method=_method(plan, beds, told, session.seeds[0]),
        tables=[
            *(_results(bed, cells[bed.name], best[bed.name]) for bed in beds),
            table(found),
            *(rates_table(bed, searched[bed.name], session.seeds[0]) for bed in (first, other)),
        ],
        plots=[
            Plot(
                bed.name,
                "step",
                "training loss",
                [mean_curve(arm, cells[bed.name][arm], "loss") for arm in ARMS],
            )
            for bed in beds
        ],
    )


# Tasks


def _sentence_beds(session: Session, plan: Plan) -> list[Bed]:
    trec, sst2 = session.data("trec"), session.data("sst2")
    data: dict[str, tuple[Values, int]]  # name -> (where its rows are, classes)
    if trec is None or sst2 is None:
        data = {
            "Subjects": ({"train": "docstrings:subjects"}, 8),
            "Subjects by module": ({"train": "docstrings:subjects-by-module"}, 8),
        }
    else:
        data = {
            "TREC": ({**_files(trec), "hold_out": 0.05}, 6),
            "SST-2": ({**_files(sst2), "hold_out": 0.01}, 2),
        }
    return [
        Bed(
            name,
            partial(_sentence_recipe, plan, source, classes),
            partial(_rates, (1e-3, 3e-3, 1e-2), (5e-5, 1.5e-4, 5e-4)),
        )
        for name, (source, classes) in data.items()
    ]


def _files(folder: Path) -> Values:
    return {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")}


def _sentence_recipe(plan: Plan, data: Values, classes: int, arm: str, rate: float, seed: int) -> Values:
    head = {"name": "fine-tuning", "workspaces": ["head"], "rate": HEAD_RATE / rate}
    return {
        "model": "minilm",
        "technique": [_technique(arm, plan.rank, BODY), head],
        "task": {"name": "text-classification", "max_length": 48},
        "data": {**data, "limit": plan.rows, "evaluation_limit": TESTED},
        "objectives": list(ARMS[arm].classes(classes)),
        "training": _training(plan.epochs, rate, seed),
    }


def _generation_bed(task: Generation, plan: Plan) -> Bed:
    def recipe(arm: str, rate: float, seed: int) -> Values:
        return {
            "model": task.base,
            "technique": _technique(arm, plan.generation_rank, None),
            "task": {"name": "causal-lm", "max_length": 224},
            "data": {**task.files, "limit": _count(task.files["train"]), "evaluation_limit": 96},
            "objectives": list(ARMS[arm].tokens),
            "training": _training(plan.generation_epochs, rate, seed),
        }

    return Bed(
        task.name,
        recipe,
        partial(_rates, (3e-3, 1e-2, 3e-2), (1e-3, 3e-3, 1e-2)),
        lambda folder, test: overlap(task, folder / "adapter"),
        None,
    )


def _rates(low: Sequence[float], full: Sequence[float], arm: str) -> Sequence[float]:
    return full if arm == FULL else low


def _technique(arm: str, rank: int, body: Sequence[str] | None) -> Values:
    if arm == FULL:
        return {**ARMS[arm].technique, **({"workspaces": list(body)} if body else {})}
    return {**ARMS[arm].technique, "rank": rank, "workspaces": ["all-linear"]}


def _training(epochs: int, rate: float, seed: int) -> Values:
    return {
        "epochs": epochs,
        "batch_size": 8,
        "learning_rate": rate,
        "evaluate_every": "never",
        "save_every": "never",
        "keep": "last",
        "order": "length",
        "log_every": 8,
        "seed": seed,
    }


# What is said


def verdict(found: Mapping[str, Pairs], cells: Mapping[str, Mapping[str, Sequence[Cell]]]) -> str:
    """How many of the papers' orders appeared, which were clear either way, and who was best where."""
    own = (_of(name, found) for name in ("KaSA", "BA-LoRA"))
    highest = "; ".join(f"{task}, {_highest(arms)}" for task, arms in cells.items())
    return " ".join((summary(found), *own, f"Highest mean: {highest}."))


def _of(name: str, found: Mapping[str, Pairs]) -> str:
    """One paper's own claim over all tasks."""
    own = [one for by_pair in found.values() for pair, one in by_pair.items() if pair[0] == name]
    held = sum(one.sign > 0 for one in own)
    if held == len(own):
        return f"{name}'s order is reproduced."
    return f"{name}'s order is {'only partly' if held else 'not'} reproduced at this size."


def _highest(arms: Mapping[str, Sequence[Cell]]) -> str:
    return max(arms, key=lambda arm: sum(cell.figures["score"] for cell in arms[arm]))


def _results(bed: Bed, cells: Mapping[str, Sequence[Cell]], best: Mapping[str, float]) -> Table:
    columns = [
        Column("accuracy, %" if bed.chosen_by else "ROUGE-L, %", "score", 1, 100),
        Column("test loss", "test loss", 3),
    ]
    means = mean_table(bed.name, cells, columns)
    rows = [
        [row[0], f"{round(cells[row[0]][0].figures['trained']):,}", f"{best[row[0]]:g}", *row[1:]]
        for row in means.rows
    ]
    return Table(bed.name, ["", "trained", "rate", *means.headings[1:]], rows)


def _method(plan: Plan, beds: Sequence[Bed], task: Generation, seed: int) -> str:
    first, second = (bed.name for bed in beds[:2])
    return (
        f"MiniLM (22.7 M values) on {first} and {second}: {plan.rows} training rows drawn by the seed, {plan.epochs} "
        f"epochs of batches of 8, rank {plan.rank} on all linear layers, {TESTED} test rows; "
        f"the fresh head has a rate of its own, {HEAD_RATE:g}, for every arm. "
        f"{task.base_name} on {task.name}: {_count(task.files['train']):,} texts, "
        f"epochs: {plan.generation_epochs}, batches of 8, rank {plan.generation_rank}; the score is ROUGE-L of greedy "
        f"answers to {len(task.asked)} test prompts, each against its nearest reference. Every arm runs by "
        f"`tune`. Rates: the best of three with seed {seed} by the validation part, {first}'s choice for {second} too; "
        "the same three for all low-rank arms, three lower ones for full fine-tuning. Equal rank: DoRA trains some 6 % "
        "more values than LoRA, KaSA 0.1 %. KaSA with its published penalties (beta 1e-4, gamma 1e-3, averaged over "
        "matrices, the code's norm). BA-LoRA with its published terms (0.15, 0.03, 0.03 for classes, k = 5 or one less "
        "than there are classes; 0.025, 0.005, 0.005, k = 10, T = 2, 20 tokens, scheduled, for tokens). With a "
        "fresh head its teacher's answers are near uniform, so consistency works against certainty there. The curves "
        "show the task's part of the loss."
    )


def _count(file: str) -> int:
    return len(Path(file).read_text(encoding="utf-8").splitlines())


STUDY = Study(
    name="weight-space",
    title="KaSA and BA-LoRA beside LoRA, PiSSA, DoRA and full fine-tuning",
    source="Wang et al. 2024, arXiv:2412.06071 (KaSA); Chang et al. 2024, arXiv:2408.04556 (BA-LoRA); Meng et al. "
    "2024, arXiv:2404.02948 (PiSSA); Liu et al. 2024, arXiv:2402.09353 (DoRA)",
    claim="At equal rank KaSA is above LoRA and PiSSA, BA-LoRA above PiSSA and PiSSA above LoRA, DoRA above LoRA; KaSA "
    "and BA-LoRA are above full fine-tuning (RoBERTa-base on GLUE: KaSA 86.3, LoRA 85.2; LLaMA-2-7B on GSM8K: "
    "BA-LoRA 55.9, PiSSA 51.5, full fine-tuning 48.9, LoRA 42.7).",
    run=run,
)
