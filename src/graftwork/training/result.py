"""What a run came to: the numbers in run.json, and the card a person reads."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from graftwork.errors import BadFile
from graftwork.reference.technique import Technique

PACKAGES = ("graftwork", "torch", "transformers", "accelerate", "safetensors", "numpy")
Scores = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The facts of a finished run.

    Attributes:
        output: the run folder.
        model, task: names as in the recipe.
        techniques: what was attached, head included, as `repr` spells it, that of a context behind its name.
        labels: names of the classes, empty elsewhere.
        examples: split -> number of examples.
        scores: split -> metric -> value, of the adapter that was kept.
        best_metric: the metric that decided which state was kept.
        steps, kept_step: optimiser steps done, and the one whose state was kept.
        stopped_early: the run ended before its last step for want of improvement.
        trainable, parameters: trained values, and values of the frozen base.
        file_bytes: size of the adapter files, and of the connector where one is trained.
        flops_per_step: operations of one optimiser step, forward and backward.
        seconds, seconds_per_step: wall time in all, and the median of a step (of one process).
        peak_bytes, peak_of: peak memory while training, of the accelerator or of the whole process.
        processes, seed, command, versions: what else it takes to repeat the run.
    """

    output: str
    model: str
    task: str
    techniques: tuple[str, ...]
    labels: tuple[str, ...]
    examples: Mapping[str, int]
    scores: Mapping[str, Scores]
    best_metric: str
    steps: int
    kept_step: int
    stopped_early: bool
    trainable: int
    parameters: int
    file_bytes: int
    flops_per_step: int
    seconds: float
    seconds_per_step: float
    peak_bytes: int
    peak_of: str
    processes: int
    seed: int
    command: str
    versions: Mapping[str, str]

    @property
    def share(self) -> float:
        """Trained values per value of the base."""
        return self.trainable / self.parameters

    @property
    def score(self) -> float:
        """The deciding metric on the validation split."""
        return self.scores["validation"][self.best_metric]

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def of(cls, facts: Mapping[str, Any], origin: str) -> RunResult:
        """From JSON; raises BadFile when it is not what `text` writes."""
        try:
            values = dict(facts)
            return cls(
                **{**values, "techniques": tuple(values["techniques"]), "labels": tuple(values["labels"])}
            )
        except (TypeError, KeyError) as error:
            raise BadFile(f"{origin} is not the result of a run: {error}") from None


def spelled(technique: Technique) -> str:
    """`LoRA(rank=4)`: the class with the options that differ from their defaults."""
    options = ", ".join(f"{name}={_short(value)}" for name, value in technique.options().items())
    return f"{type(technique).__name__}({options})"


def _short(value: object) -> str:
    if isinstance(value, Mapping) and len(value) > 3:
        return f"{{{len(value)} of them}}"
    return repr(value)


def versions() -> dict[str, str]:
    """What the run depended on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def card(result: RunResult) -> str:
    """Markdown for people: what it is, what it scores, what it costs, how to get it again."""
    return "\n".join(
        [
            f"# {' + '.join(result.techniques)} on {result.model}",
            "",
            f"{result.task}; {', '.join(f'{n:,} {split}' for split, n in result.examples.items())} examples.",
            "",
            *_scores(result),
            "",
            "![curves](curves.png)",
            "",
            *_costs(result),
            "",
            "```",
            result.command,
            "```",
            "",
            f"Seed {result.seed}; {', '.join(f'{name} {v}' for name, v in result.versions.items())}.",
            "",
        ]
    )


def _scores(result: RunResult) -> list[str]:
    splits = list(result.scores)
    names = dict.fromkeys(name for scores in result.scores.values() for name in scores)
    rows = [_row(name, *(_number(result.scores[s].get(name)) for s in splits)) for name in names]
    return [_row("score", *splits), _row("---", *(["---:"] * len(splits))), *rows]


def _costs(result: RunResult) -> list[str]:
    early = ", stopped early" if result.stopped_early else ""
    rows = {
        "trainable values": f"{result.trainable:,} ({result.share:.3%} of {result.parameters:,})",
        "adapter file": size(result.file_bytes),
        "steps": f"{result.steps:,} (kept: step {result.kept_step:,}{early})",
        "operations per step": f"{result.flops_per_step / 1e9:,.2f} G",
        "seconds per step": f"{result.seconds_per_step:.4f} ({result.seconds:.1f} s in all)",
        "peak memory": f"{size(result.peak_bytes)} ({result.peak_of})",
        "processes": str(result.processes),
    }
    return [_row("cost", ""), _row("---", "---:"), *(_row(*row) for row in rows.items())]


def size(count: float) -> str:
    """`1.25 MB`: bytes in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
