"""A tiny host with a tokenizer on disk, and rows for it: runs go through the same doors as a user's."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from graftwork.testing import VOCABULARY, tiny

torch.set_num_threads(1)
SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]"]
WORDS = [f"w{number}" for number in range(VOCABULARY - len(SPECIAL))]


def save_host(family: str, folder: Path) -> Path:
    """The tiny model of a family with a word-level tokenizer."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        model_max_length=64,
    ).save_pretrained(folder)
    tiny(family).save_pretrained(folder)
    return folder


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
