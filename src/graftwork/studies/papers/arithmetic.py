"""The four uses of adapter arithmetic: halves of a task, two tasks, unlearning, another domain."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from graftwork.data import embedded
from graftwork.data.readers import read_rows
from graftwork.studies import stories
from graftwork.studies.cells import Cell, Measured
from graftwork.studies.composing import (
    ALLOWED,
    LENGTH,
    SAMPLES,
    Corpus,
    Plan,
    distribution,
    multitask,
    transfer,
    unlearning,
)
from graftwork.studies.findings import Findings, Plot, Table, mean_curve
from graftwork.studies.session import Session
from graftwork.studies.spread import Difference, difference, over_seeds
from graftwork.studies.study import Study
from graftwork.studies.training import Labelled

SMALL = Plan(rows=800, chosen_by=100, reported=240, steps=48, points=5)
FULL = Plan(rows=15_000, chosen_by=500, reported=2_000, steps=1_500, points=11)
KINDS = {"small": ("lora",), "full": ("lora", "ia3")}
NAMES = {"lora": "LoRA", "ia3": "(IA)3"}
ABOUT = {"lora": "LoRA of rank 8 on query and value (rate 4e-3)", "ia3": "(IA)3 (rate 2e-2)"}
HALVES, TASKS, STYLE, DOMAIN = "distribution generalisation", "multi-tasking", "unlearning", "domain transfer"
CLAIMED = 1.03  # of the clean perplexity
Cells = dict[str, list[Cell]]


def run(session: Session) -> Findings:
    plan: Plan = session.pick(small=SMALL, full=FULL)
    corpora = read(session, plan)
    main, one, two, source, target = corpora
    kinds = KINDS[session.settings.size]
    weights = session.data(stories.NAME)
    found: dict[str, Cells] = {}
    if weights:
        found[STYLE] = _cells(session, STYLE, kinds, "direct speech", plan, partial(_style, weights, plan))
    found |= {
        HALVES: _cells(session, HALVES, kinds, main.name, plan, partial(_halves, main, plan)),
        TASKS: _cells(
            session, TASKS, ("lora",), f"{one.name} and {two.name}", plan, partial(_tasks, (one, two), plan)
        ),
        DOMAIN: _cells(
            session,
            DOMAIN,
            ("lora",),
            f"{source.name} to {target.name}",
            plan,
            partial(_domain, source, target, plan),
        ),
    }
    return Findings(
        verdict=verdict(found),
        method=_method(plan, kinds, corpora, STYLE in found),
        tables=list(tables(found, (one.name, two.name))),
        plots=[
            Plot(
                f"{TASKS}, held-out rows",
                f"weight of {one.name}",
                "mean accuracy",
                [mean_curve("mixture", found[TASKS]["lora"], "mean accuracy")],
            ),
            Plot(
                f"{DOMAIN}, held-out rows",
                "weight of the classifier",
                "accuracy",
                [mean_curve("moved", found[DOMAIN]["lora"], "accuracy")],
            ),
        ],
    )


def _cells(
    session: Session,
    use: str,
    kinds: Sequence[str],
    task: str,
    plan: Plan,
    measure: Callable[[str, int], Measured],
) -> Cells:
    given = {"rows": plan.rows, "steps": plan.steps, "points": plan.points, "reported": plan.reported}
    return {
        kind: [
            session.cell(NAMES[kind], f"{use}: {task}", seed, partial(measure, kind, seed), **given)
            for seed in session.seeds
        ]
        for kind in kinds
    }


def _halves(corpus: Corpus, plan: Plan, kind: str, seed: int) -> Measured:
    return distribution(kind, corpus, plan, seed)


def _tasks(tasks: tuple[Corpus, Corpus], plan: Plan, kind: str, seed: int) -> Measured:
    return multitask(kind, tasks, plan, seed)


def _domain(source: Corpus, target: Corpus, plan: Plan, kind: str, seed: int) -> Measured:
    return transfer(kind, source, target, plan, seed)


def _style(weights: Path, plan: Plan, kind: str, seed: int) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        return unlearning(kind, stories.prepare(weights, Path(folder) / "host"), plan, seed)


# Data


def read(session: Session, plan: Plan) -> tuple[Corpus, Corpus, Corpus, Corpus, Corpus]:
    """The task that is halved, the two tasks, source and target domain; docstrings where data are missing."""
    films, sentences = session.data("sst2"), session.data("sentence-classification")
    if films is None or sentences is None:
        return _embedded(plan)
    reviews = _corpus(
        "SST-2", ("negative", "positive"), _rows(films / "train.jsonl"), _rows(films / "dev.jsonl"), plan
    )
    subjective = _pair(sentences, "subj", "Subj", ("subjective", "objective"), plan)
    customers = _pair(sentences, "custrev", "CR", ("negative", "positive"), plan)
    return reviews, subjective, customers, reviews, customers


def _pair(folder: Path, stem: str, name: str, classes: tuple[str, str], plan: Plan) -> Corpus:
    return _corpus(
        name, classes, _rows(folder / f"{stem}.train.jsonl"), _rows(folder / f"{stem}.test.jsonl"), plan
    )


def _corpus(name: str, classes: tuple[str, str], train: Labelled, test: Labelled, plan: Plan) -> Corpus:
    """The same rows for all seeds, drawn once."""
    order = random.Random(0).sample(range(len(train)), len(train))
    held = order[: plan.chosen_by]
    kept = order[plan.chosen_by : plan.chosen_by + plan.rows]
    shown = random.Random(1).sample(range(len(test)), min(plan.reported, len(test)))
    return Corpus(name, classes, train.part(kept), train.part(held), test.part(shown))


def _rows(file: Path) -> Labelled:
    rows = read_rows(file)
    return Labelled(rows["text"], [int(label) for label in rows["label"]])


def _embedded(plan: Plan) -> tuple[Corpus, Corpus, Corpus, Corpus, Corpus]:
    main = _subjects("networking", "files and storage", plan)
    one = _subjects("text and markup", "data types and numbers", plan)
    two = _subjects("concurrency", "development and language", plan)
    first = _subjects("networking", "files and storage", plan, lambda text: text.partition("\n")[0])
    rest = _subjects("networking", "files and storage", plan, lambda text: text.partition("\n")[2] or text)
    return main, one, two, replace(first, name="summaries"), replace(rest, name="bodies")


def _subjects(zero: str, one: str, plan: Plan, shown: Callable[[str], str] = str) -> Corpus:
    def labelled(split: str) -> Labelled:
        rows = embedded.subjects(split)
        pairs = [
            (shown(t), int(s == one))
            for t, s in zip(rows["text"], rows["label"], strict=True)
            if s in (zero, one)
        ]
        return Labelled([text for text, _ in pairs], [label for _, label in pairs])

    return _corpus(f"{zero} or {one}", (zero, one), labelled("train"), labelled("test"), plan)


# What is said


def gain(cells: Sequence[Cell], first: str, second: str) -> Difference:
    """One figure less another of the same cells, paired by seed."""
    one, two = (
        [replace(cell, figures={"x": cell.figures[name]}) for cell in cells] for name in (first, second)
    )
    return difference(one, two, "x")


def verdict(found: Mapping[str, Cells]) -> str:
    """One sentence for each use."""
    said = [_of_halves(found[HALVES]), _of_tasks(found[TASKS]["lora"])]
    said += [_of_style(found[STYLE])] if STYLE in found else []
    return " ".join([*said, _of_domain(found[DOMAIN]["lora"])])


_WORDS = {1: "clearly above", 0: "not clearly different from", -1: "clearly below"}


def _of_halves(cells: Cells) -> str:
    parts = []
    for kind, own in cells.items():
        best = max(("first half", "second half"), key=lambda half: over_seeds(own, half).mean)
        found = gain(own, "sum of parameters", best)
        parts.append(
            f"{NAMES[kind]}'s sum is {_WORDS[found.sign]} its better half ({100 * found.spread.mean:+.1f} points)"
        )
    return f"**{HALVES.capitalize()}**: {'; '.join(parts)}."


def _of_tasks(cells: Sequence[Cell]) -> str:
    means = [replace(cell, figures=_mean_by_arm(cell)) for cell in cells]
    singles = [arm for arm in means[0].figures if arm != "mixture"]
    best = max(singles, key=lambda arm: over_seeds(means, arm).mean)
    found = gain(means, "mixture", best)
    return (
        f"**{TASKS.capitalize()}**: on the mean of both tasks the mixture is {_WORDS[found.sign]} the better single "
        f"adapter, that of {best} ({100 * found.spread.mean:+.1f} points)."
    )


def _mean_by_arm(cell: Cell) -> dict[str, float]:
    by_arm: dict[str, list[float]] = {}
    for name, value in cell.figures.items():
        if " on " in name:
            by_arm.setdefault(name.partition(" on ")[0], []).append(value)
    return {arm: sum(values) / len(values) for arm, values in by_arm.items()}


def _of_style(cells: Cells) -> str:
    parts = []
    for kind, own in cells.items():
        found = gain(own, "adapter negated: texts in the style", "host: texts in the style")
        ratio = max(_ratio(cell) for cell in own)
        gone = "goes down clearly" if found.sign < 0 else "does not go down clearly"
        parts.append(
            f"with {NAMES[kind]} the style {gone} ({_share(own, 'host')} of the texts to "
            f"{_share(own, 'adapter negated')}) and the perplexity of clean text is at most {ratio:.3f} times the "
            f"host's, {'within' if ratio <= CLAIMED else 'beyond'} 3 %"
        )
    return f"**{STYLE.capitalize()}**: {'; '.join(parts)}."


def _ratio(cell: Cell) -> float:
    return cell.figures["adapter negated: clean perplexity"] / cell.figures["host: clean perplexity"]


def _share(cells: Sequence[Cell], arm: str) -> str:
    return f"{over_seeds(cells, f'{arm}: texts in the style').mean:.0%}"


def _of_domain(cells: Sequence[Cell]) -> str:
    found = gain(cells, "moved to the target", "source classifier")
    return (
        f"**{DOMAIN.capitalize()}**: the moved classifier is {_WORDS[found.sign]} the source classifier on the "
        f"target ({100 * found.spread.mean:+.1f} points)."
    )


def tables(found: Mapping[str, Cells], tasks: tuple[str, str]) -> list[Table]:
    """One for each use: single adapters beside what is made of them."""
    made = [
        _arms(
            HALVES,
            found[HALVES],
            ["first half", "second half", "sum of parameters", "sum of updates"],
        )
    ]
    rows = [
        [arm, *(over_seeds(found[TASKS]["lora"], f"{arm} on {task}").text() for task in tasks)]
        for arm in (*tasks, "mixture")
    ]
    note = f"Weight of {tasks[0]} in the mixture: {over_seeds(found[TASKS]['lora'], 'weight').text(2)}."
    made.append(Table(f"{TASKS.capitalize()}: accuracy, LoRA", ["adapter of", *tasks], rows, [note]))
    for kind, cells in found.get(STYLE, {}).items():
        made.append(_style_table(kind, cells))
    domain = found[DOMAIN]
    table = _arms(DOMAIN, domain, ["source classifier", "moved to the target"])
    weight = f"Weight of the classifier: {over_seeds(domain['lora'], 'weight').text(2)}."
    return [*made, replace(table, notes=[weight])]


def _arms(use: str, cells: Cells, arms: Sequence[str]) -> Table:
    rows = [
        [arm, *(over_seeds(own, arm).text() if arm in own[0].figures else "" for own in cells.values())]
        for arm in arms
    ]
    return Table(f"{use.capitalize()}: accuracy", ["adapter", *(NAMES[kind] for kind in cells)], rows)


def _style_table(kind: str, cells: Sequence[Cell]) -> Table:
    figures = ("texts in the style", "style perplexity", "clean perplexity")
    rows = [
        [arm, *(over_seeds(cells, f"{arm}: {figure}").text(2) for figure in figures)]
        for arm in ("host", "adapter added", "adapter negated")
    ]
    note = f"Strength of the negation: {over_seeds(cells, 'weight').text(2)}."
    return Table(f"{STYLE.capitalize()}: {NAMES[kind]}", ["", *figures], rows, [note])


def _method(plan: Plan, kinds: Sequence[str], corpora: Sequence[Corpus], style: bool) -> str:
    main, one, two, source, target = corpora
    text = (
        f"{' and '.join(ABOUT[kind] for kind in kinds)}. Sentences: MiniLM, {plan.steps} steps of 16 "
        f"sentences cut at 24 tokens, at most {plan.rows} rows to train on, {plan.chosen_by} to choose a weight by, "
        f"{plan.reported} to report. All adapters of a sum start from the same values. **{HALVES.capitalize()}**, "
        f"{main.name}: the first half takes 80 % of class 0 and is filled with the other class, the second is "
        f"the rest; both are summed at weights 0.5, factor by factor, heads too. **{TASKS.capitalize()}**, "
        f"{one.name} and {two.name}: `w a + (1-w) b`, w from a grid of {plan.points}; each task is read by its own "
        f"head. **{DOMAIN.capitalize()}**, {source.name} to {target.name}: `w c + (1-w)(t - s)` with a classifier c of "
        "the source and adapters t and s trained to name masked words of either domain by one frozen head; w from a "
        f"grid of {plan.points} between 0.5 and 1 by labelled rows of the target."
    )
    if not style:
        return f"{text} Unlearning was left out: {stories.NAME} is not in the data folder."
    return (
        f"{text} **{STYLE.capitalize()}**: stories260k writes {6 * SAMPLES} stories of {LENGTH} tokens (temperature "
        "1); those in which somebody speaks (a quotation mark) are the undesired style, the others clean text; "
        "a tenth of either chooses the strength, a tenth is reported. An adapter is trained on the style and "
        f"subtracted. The strength, from a grid of {2 * plan.points - 1}, is the one that makes the style least likely "
        f"while clean text held out stays within {ALLOWED:.2f} of its perplexity. The share is of {2 * SAMPLES} "
        "new stories."
    )


STUDY = Study(
    name="arithmetic",
    title="Adapter arithmetic: sums and negatives of trained adapters",
    source="Zhang, Chen, Liu and He 2023, arXiv:2306.14870",
    claim="Adding and negating the parameters of trained adapters, without training, generalises over the halves of a "
    "task, serves two tasks at once, unlearns a style while clean text stays, and moves a classifier to another "
    "domain: in each the sum is better than the single adapters.",
    run=run,
)
