"""A generation task for a small pretrained Llama: files for recipes, and how well its texts fit the references."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from graftwork.adapters.store import load
from graftwork.data.embedded import summaries
from graftwork.models.base import load_base
from graftwork.models.pretraining import cached
from graftwork.studies.stories import prepare
from graftwork.tasks.overlap import rouge_l

Row = tuple[str, list[str]]  # prompt, references
ASKED, BATCH, LONGEST = 48, 48, 80  # texts to generate, at a time, tokens of each
HELD_OUT = 0.1


@dataclass(frozen=True)
class Generation:
    """A task ready for recipes.

    Attributes:
        name, base: the task's name and the base model's folder.
        base_name: as the page says it.
        files: train, validation, test as JSON lines of prompt and completion.
        asked: prompts with references to generate for, from the test part.
    """

    name: str
    base: str
    base_name: str
    files: dict[str, str]
    asked: Sequence[Row]


@lru_cache(maxsize=1)
def generation(weights: Path | None, texts: Path | None, most: int) -> Generation:
    """E2E with stories260k where both are present, else summaries of docstrings with the small Llama host.

    `most` references of each prompt are trained on.
    """
    folder = Path(tempfile.mkdtemp(prefix="graftwork-study-"))
    if weights is not None and texts is not None:
        train, test = (_meanings(texts / f"{part}.jsonl") for part in ("valid", "test"))
        name, base, base_name = "E2E", str(prepare(weights, folder / "base")), "stories260k"
    else:
        train, test = (_summaries(part) for part in ("train", "test"))
        name, base, base_name = "Summaries", str(cached("tiny-llama", make=True)), "tiny-llama"
    random.Random(0).shuffle(test)
    held = max(1, round(len(train) * HELD_OUT))
    parts = {"train": train[held:], "validation": train[:held], "test": test}
    files = {
        part: _write(folder / f"{part}.jsonl", rows, most if part == "train" else 1)
        for part, rows in parts.items()
    }
    return Generation(name, base, base_name, files, test[:ASKED])


@torch.no_grad()
def overlap(task: Generation, adapter: Path) -> float:
    """Mean ROUGE-L of greedy answers, each against the reference it is nearest to."""
    model, tokenizer = load_base(task.base, task="causal-lm")
    load(model.eval(), adapter)
    tokenizer.padding_side = "left"
    found = []
    for start in range(0, len(task.asked), BATCH):
        rows = task.asked[start : start + BATCH]
        texts = _answers(model, tokenizer, [prompt for prompt, _ in rows])
        found += [
            max(rouge_l(text, wanted) for wanted in row[1]) for text, row in zip(texts, rows, strict=True)
        ]
    return sum(found) / len(found)


def _answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    given = tokenizer(prompts, return_tensors="pt", padding=True)
    given.pop("token_type_ids", None)
    ids = model.generate(
        **given, max_new_tokens=LONGEST, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    texts: list[str] = tokenizer.batch_decode(ids[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def _meanings(file: Path) -> list[Row]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    return [(row["meaning"] + "\n", row["references"]) for row in rows]


def _summaries(part: str) -> list[Row]:
    rows = summaries(part)
    return [
        (source[:300] + "\n", [target]) for source, target in zip(rows["source"], rows["target"], strict=True)
    ]


def _write(file: Path, rows: Sequence[Row], most: int) -> str:
    """A row for each reference of a prompt, the first `most` of them."""
    lines = [
        json.dumps({"prompt": prompt, "completion": text})
        for prompt, references in rows
        for text in references[:most]
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)
