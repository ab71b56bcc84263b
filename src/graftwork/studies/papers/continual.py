"""Prompts beside LoRA in continual learning (Wistuba et al. 2024, arXiv:2406.03216)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftwork.continual.features import Pooling
from graftwork.continual.learning import Learning
from graftwork.continual.method import Method
from graftwork.continual.pool import AdapterPool
from graftwork.continual.prompt_pool import PromptPool
from graftwork.continual.run import accuracy, run
from graftwork.continual.samples import Samples
from graftwork.continual.scenario import Scenario, by_classes, by_domains
from graftwork.continual.sequential import Sequential
from graftwork.continual.task_adapters import TaskAdapters
from graftwork.data.embedded import digits, subjects
from graftwork.data.rows import Rows
from graftwork.data.tables import read_json_lines
from graftwork.models.base import MINILM, load_base, load_preprocessor, locate
from graftwork.studies.cells import Cell, Measured
from graftwork.studies.findings import Findings, Table
from graftwork.studies.session import Session
from graftwork.studies.spread import difference, over_seeds
from graftwork.studies.study import Study
from graftwork.tasks.image_classification import ImageClassification
from graftwork.techniques.fine_tuning import FineTuning
from graftwork.techniques.lora import LoRA
from graftwork.techniques.prompt_tuning import PromptTuning

S_PROMPTS, S_LORA, L2P, L2L = "S-Prompts", "S-LoRA", "L2P", "L2L"
SEQUENTIAL, JOINT = "sequential fine-tuning", "joint fine-tuning"
RATES: Mapping[str, tuple[float, ...]] = {
    S_PROMPTS: (1e-2, 4e-2),
    S_LORA: (2e-3, 8e-3),
    L2P: (1e-2, 4e-2),
    L2L: (2e-3, 8e-3),
    SEQUENTIAL: (1e-4, 3e-4),
    JOINT: (1e-4, 3e-4),
}
PAIRS = ((S_LORA, S_PROMPTS), (L2L, L2P))
QUERY_VALUE = ("attention.query", "attention.value")
VIT = "tiny-vit"
DIGITS = range(10)
LONGEST = 32  # tokens


@dataclass(frozen=True)
class Plan:
    """Rows of each class to train on, to choose the rate by, and to report; passes over a task's data."""

    train: int
    chosen_by: int
    reported: int
    epochs: int
    batch: int = 8


Find = Callable[[str], Path | None]


@dataclass(frozen=True)
class Material:
    """A scenario on its host, and samples of all tasks to choose the rate by."""

    name: str
    host: str
    pooling: Pooling
    scenario: Scenario
    chosen_by: Samples


def measure(session: Session) -> Findings:
    found: dict[str, dict[str, list[Cell]]] = {}
    for source in SOURCES:
        if source.material(session.data, source.plan(session), session.seeds[0]) is not None:
            arms = {arm: _arm(session, source, arm) for arm in METHODS}
            found[arms[S_PROMPTS][0].task] = arms
    tables = [_results(name, arms) for name, arms in found.items()]
    return Findings(verdict=verdict(found), method=_method(session), tables=[*tables, _identities(found)])


def _arm(session: Session, source: Source, arm: str) -> list[Cell]:
    """Cells of all seeds, at the rate that served the first seed best on the rows to choose by."""
    tried = [_cell(session, source, arm, session.seeds[0], rate) for rate in RATES[arm]]
    best = max(tried, key=lambda cell: cell.figures["choice"])
    return [best, *(_cell(session, source, arm, seed, _rate(best)) for seed in session.seeds[1:])]


def _rate(cell: Cell) -> float:
    return float(str(cell.given["rate"]))


# Data


@dataclass(frozen=True)
class Source:
    """How a scenario is made, from the folders of data sets by name; None where it has none."""

    material: Callable[[Find, Plan, int], Material | None]
    small: Plan
    full: Plan

    def plan(self, session: Session) -> Plan:
        chosen: Plan = session.pick(small=self.small, full=self.full)
        return chosen


@lru_cache(maxsize=8)
def split_digits(find: Find, plan: Plan, seed: int) -> Material:
    """scikit-learn's digits: five tasks of two."""
    parts = [_images(part) for part in _draw(digits("train"), digits("test"), DIGITS, plan, seed)]
    scenario = by_classes(parts[0], parts[2], 5)
    return Material("digits, five tasks of two classes", VIT, "first", scenario, parts[1])


@lru_cache(maxsize=8)
def split_intents(find: Find, plan: Plan, seed: int) -> Material:
    """CLINC150: five domains of three intents each; without it, ten subjects of docstrings, two a task."""
    folder = find("clinc150")
    if folder is None:
        train, test = subjects("train"), subjects("test")
        groups, name = _subjects(train), "docstrings, five tasks of two subjects"
    else:
        train, test = (read_json_lines(folder / f"{part}.jsonl", None) for part in ("train", "test"))
        groups, name = _intents(train), "intents (CLINC150), five domains of three classes"
    labels = [label for group in groups for label in group]
    parts = [_texts(part, labels) for part in _draw(train, test, labels, plan, seed)]
    numbers = [[labels.index(label) for label in group] for group in groups]
    return Material(name, MINILM, "mean", by_classes(parts[0], parts[2], numbers), parts[1])


@lru_cache(maxsize=8)
def reviews(find: Find, plan: Plan, seed: int) -> Material | None:
    """Opinions on films (SST-2), then on products (customer reviews)."""
    films, products = find("sst2"), find("sentence-classification")
    if films is None or products is None:
        return None
    files = {
        "films": [films / "train.jsonl", films / "test.jsonl"],
        "products": [products / "custrev.train.jsonl", products / "custrev.test.jsonl"],
    }
    drawn = {}
    for name, pair in files.items():
        train, test = (read_json_lines(file, None) for file in pair)
        drawn[name] = [_texts(part, [0, 1]) for part in _draw(train, test, [0, 1], plan, seed)]
    scenario = by_domains({name: (parts[0], parts[2]) for name, parts in drawn.items()})
    chosen_by = Samples.joined([parts[1] for parts in drawn.values()])
    return Material("opinions, on films and then on products", MINILM, "mean", scenario, chosen_by)


SOURCES = (
    Source(
        split_digits,
        small=Plan(train=12, chosen_by=5, reported=12, epochs=5),
        full=Plan(train=40, chosen_by=20, reported=30, epochs=20),
    ),
    Source(
        split_intents,
        small=Plan(train=6, chosen_by=2, reported=7, epochs=6, batch=9),
        full=Plan(train=30, chosen_by=8, reported=40, epochs=20),
    ),
    Source(
        reviews,
        small=Plan(train=40, chosen_by=30, reported=60, epochs=4, batch=10),
        full=Plan(train=400, chosen_by=100, reported=130, epochs=5),
    ),
)


def _draw(train: Rows, test: Rows, labels: Sequence[Any], plan: Plan, seed: int) -> tuple[Rows, Rows, Rows]:
    """Rows to train on and to choose by from `train`, and to report from `test`: so many of each label."""
    rng, upper = random.Random(seed), plan.train + plan.chosen_by
    of_train, of_test = ({label: _numbers(rows, label, rng) for label in labels} for rows in (train, test))
    return (
        train.select([n for numbers in of_train.values() for n in numbers[: plan.train]]),
        train.select([n for numbers in of_train.values() for n in numbers[plan.train : upper]]),
        test.select([n for numbers in of_test.values() for n in numbers[: plan.reported]]),
    )


def _numbers(rows: Rows, label: Any, rng: random.Random) -> list[int]:
    found = [n for n, each in enumerate(rows["label"]) if each == label]
    rng.shuffle(found)
    return found


def _images(rows: Rows) -> Samples:
    """Grey images, in the size of the host."""
    labels = tuple(str(number) for number in DIGITS)
    processor = load_preprocessor(locate(VIT, pretrain=True), "image-classification")
    named = Rows({"image": rows["image"], "label": [str(label) for label in rows["label"]]}, rows.origin)
    task = ImageClassification(labels=labels)
    return Samples.of(task.encode(named, processor), task.collator(processor))


def _texts(rows: Rows, labels: Sequence[Any]) -> Samples:
    """Token ids, padded to one length."""
    tokenizer = load_preprocessor(locate(MINILM), "text-classification")
    encoded = tokenizer(
        list(rows["text"]), truncation=True, max_length=LONGEST, padding="max_length", return_tensors="pt"
    )
    return Samples(dict(encoded), torch.tensor([labels.index(label) for label in rows["label"]]))


def _intents(train: Rows) -> list[list[str]]:
    """The first three intents of the first five domains, in the order of the file."""
    found: dict[str, list[str]] = {}
    for domain, label in zip(train["domain"], train["label"], strict=True):
        intents = found.setdefault(domain, [])
        if label not in intents:
            intents.append(label)
    return [intents[:3] for domain, intents in found.items() if domain != "oos"][:5]


def _subjects(train: Rows) -> list[list[str]]:
    """The ten subjects with the most docstrings, two a task."""
    labels = [label for label, _ in Counter(train["label"]).most_common(10)]
    return [labels[n : n + 2] for n in range(0, len(labels), 2)]


# One run


def _sequential(model: nn.Module, material: Material) -> Method:
    everything = FineTuning(workspaces=("all-linear",))
    return Sequential(model, everything, material.scenario.classes, pooling=material.pooling)


def _lora(rank: int) -> LoRA:
    return LoRA(rank=rank, alpha=2.0 * rank, workspaces=QUERY_VALUE)


METHODS: Mapping[str, Callable[[nn.Module, Material], Method]] = {
    S_PROMPTS: lambda model, m: TaskAdapters(model, PromptTuning(length=5), pooling=m.pooling),
    S_LORA: lambda model, m: TaskAdapters(model, _lora(4), pooling=m.pooling),
    L2P: lambda model, m: PromptPool(model, m.scenario.classes, length=3, chosen=2, pooling=m.pooling),
    L2L: lambda model, m: AdapterPool(model, _lora(2), m.scenario.classes, chosen=2, pooling=m.pooling),
    SEQUENTIAL: _sequential,
    JOINT: _sequential,
}


def _cell(session: Session, source: Source, arm: str, seed: int, rate: float) -> Cell:
    plan = source.plan(session)
    material = source.material(session.data, plan, seed)
    assert material is not None
    given = {"rate": rate, "train": plan.train, "epochs": plan.epochs, "batch": plan.batch}
    return session.cell(arm, material.name, seed, partial(learn, arm, material, plan, seed, rate), **given)


def learn(arm: str, material: Material, plan: Plan, seed: int, rate: float) -> Measured:
    """One run over the tasks (over all at once for the joint one): shares of test rows that are named right."""
    model, _ = load_base(material.host)
    method = METHODS[arm](model.requires_grad_(False), material)
    joint = arm == JOINT
    scenario = material.scenario.joined() if joint else material.scenario
    result = run(
        scenario, method, Learning(epochs=plan.epochs, batch_size=plan.batch, learning_rate=rate, seed=seed)
    )
    figures = {
        "choice": accuracy(method, material.chosen_by),
        "trained": sum(p.numel() for p in method.parameters()),
    }
    if joint:
        last = [accuracy(method, task.test) for task in material.scenario.tasks]
        return Measured({**figures, "average": sum(last) / len(last)})
    figures |= {"average": result.average_accuracy, "forgetting": result.forgetting}
    if isinstance(method, TaskAdapters):
        figures["identity"] = _identity(method, material.scenario)
    return Measured(figures)


def _identity(method: TaskAdapters, scenario: Scenario) -> float:
    """Share of test rows that are given to the task they are of."""
    right = [method.task_of(task.test) == number for number, task in enumerate(scenario.tasks)]
    return float(torch.cat(right).float().mean())


# What is said


def verdict(found: Mapping[str, Mapping[str, Sequence[Cell]]]) -> str:
    """In how many comparisons LoRA is clearly above prompts, and each difference."""
    words = {1: "higher", 0: "not clearly different", -1: "lower"}
    signs, lines = [], []
    for name, arms in found.items():
        for lora, prompts in PAIRS:
            apart = difference(arms[lora], arms[prompts], "average")
            signs.append(apart.sign)
            points = apart.spread.text(1, 100)
            lines.append(f"- {name}: {lora} less {prompts} {points} points, {words[apart.sign]}.")
    return "\n".join([_said(signs), "", *lines])


def _said(signs: Sequence[int]) -> str:
    above, level, below = (signs.count(sign) for sign in (1, 0, -1))
    if above == len(signs):
        return (
            f"The finding appeared: in all {above} comparisons LoRA is clearly more accurate than the prompt."
        )
    appeared = "The finding appeared in part" if above else "The finding did not appear"
    return (
        f"{appeared}: of {len(signs)} comparisons LoRA's average accuracy is clearly above the prompt's in {above}, "
        f"not told apart in {level} and clearly below in {below}."
    )


def _results(name: str, arms: Mapping[str, Sequence[Cell]]) -> Table:
    rows = []
    for arm, cells in arms.items():
        forgot = "forgetting" in cells[0].figures
        rows.append(
            [
                arm,
                over_seeds(cells, "average").text(1, 100),
                over_seeds(cells, "forgetting").text(1, 100) if forgot else "",
                f"{cells[0].figures['trained']:,.0f}",
                f"{_rate(cells[0]):g}",
            ]
        )
    headings = ("", "average accuracy, %", "forgetting, points", "values trained in a task", "rate")
    return Table(name[0].upper() + name[1:], headings, rows)


def _identities(found: Mapping[str, Mapping[str, Sequence[Cell]]]) -> Table:
    rows = [[name, over_seeds(arms[S_LORA], "identity").text(1, 100)] for name, arms in found.items()]
    return Table(
        "Test rows given to their own task by k-means centres",
        ("", "%"),
        rows,
        [
            "The same for S-Prompts and S-LoRA, since the base's features alone decide. Without the right task the "
            "right class is out of reach in class-incremental scenarios."
        ],
    )


def _method(session: Session) -> str:
    plans = [source.plan(session) for source in SOURCES]
    sizes = "; ".join(f"{plan.train}, {plan.epochs}, {plan.batch}" for plan in plans)
    return (
        "Frozen hosts: a vision transformer of 2.7 M values pretrained on the digits 0 to 4 for digits, and "
        "MiniLM (22.7 M) for texts. Rows of each class in each task, passes over a task, rows in a batch: "
        f"{sizes}. Adam, gradients clipped at 1; no row is kept, no task named at test. S-Prompts: 5 positions"
        " per task; S-LoRA: rank 4 on queries and values per task; five centres per task, L2. L2P: 10 prompts"
        " of 3 positions, 2 chosen for each sample, the head reads their outputs; L2L: 10 LoRAs of rank 2, 2 "
        "chosen, the head reads the usual features; keys pulled with weight 0.1. All but S-Prompts and S-LoRA"
        " have one head and leave other tasks' classes out of the training loss. Lower bound: all linear "
        "layers trained task after task; upper bound: the same on all tasks at once. Seeds decide the rows "
        "drawn, the start and the order. The rate of each arm is the better of two, by accuracy on further "
        f"rows, with seed {session.seeds[0]}. Forgetting is the mean drop from the best accuracy on a task "
        "before the last one was learnt."
    )


STUDY = Study(
    name="continual",
    title="Prompts beside LoRA in continual learning",
    source="Wistuba, Sivaprasad, Balles, Zappella 2024, Choice of PEFT Technique in Continual Learning: Prompt Tuning "
    "is Not All You Need, arXiv:2406.03216",
    claim="With LoRA in place of prompts, Learning to Prompt and S-Prompts are more accurate on class- and "
    "domain-incremental tasks.",
    run=measure,
)
