"""Rows and recipes for a tiny host on disk."""

import json
import random
from pathlib import Path

import torch

from small_bases import WORDS
from small_bases import save_host as save_host

torch.set_num_threads(1)


def save_rows(file: Path, count: int, seed: int) -> Path:
    """Texts of three to nine words; the label says whether the first word's number is even."""
    draw = random.Random(seed)
    with file.open("w") as out:
        for _ in range(count):
            numbers = [draw.randrange(len(WORDS)) for _ in range(draw.randrange(3, 10))]
            row = {"text": " ".join(WORDS[n] for n in numbers), "label": ["even", "odd"][numbers[0] % 2]}
            out.write(json.dumps(row) + "\n")
    return file


def recipe_values(stage: Path, output: Path, **training: object) -> dict[str, object]:
    """A classification run of nine steps on the stage."""
    defaults = {
        "epochs": 1.5,
        "batch_size": 8,
        "learning_rate": 5e-3,
        "log_every": 2,
        "evaluate_every": 3,
        "save_every": 1,
    }
    return {
        "model": str(stage / "host"),
        "technique": {"name": "lora", "rank": 2, "dropout": 0.1, "up_rate": 4.0},
        "task": "text-classification",
        "data": {"train": str(stage / "train.jsonl"), "validation": str(stage / "dev.jsonl")},
        "training": {**defaults, **training},
        "output": str(output),
    }
