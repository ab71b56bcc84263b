"""stories260k as a folder that `load_base` reads: its weights and a tokenizer made from its scored pieces.

The model (Karpathy, llama2.c) names its vocabulary as pieces with scores: text begins with a space, is cut into
characters (bytes `<0x0A>` where one is unknown), and the adjacent pair whose joined piece scores highest is joined,
until none is left. That is byte-pair encoding with the merges ordered by the score of what they make.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from graftwork.errors import BadData

NAME = "weights-stories260k"
UNKNOWN, START, END = "<unk>", "<s>", "</s>"


def prepare(source: Path, target: Path) -> Path:
    """Write weights, configuration and tokenizer into `target`; BadData where `source` lacks a file."""
    files = [source / name for name in ("config.json", "model.safetensors", "vocab.jsonl")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise BadData(f"{source} has no {', '.join(missing)}: it is no folder of stories260k")
    target.mkdir(parents=True, exist_ok=True)
    for file in files[:2]:
        shutil.copyfile(file, target / file.name)
    entries = [json.loads(line) for line in files[2].read_text(encoding="utf-8").splitlines()]
    tokenizer({entry["piece"]: entry["score"] for entry in entries}).save_pretrained(target)
    return target


def tokenizer(scores: Mapping[str, float]) -> Any:
    """From pieces in the order of their numbers; the first three are the unknown, start and end marks.

    Pads with the end mark, on the left, as generation needs it.
    """
    pieces = [UNKNOWN, START, END, *list(scores)[3:]]
    known = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(
        models.BPE(known, merges(pieces, scores), unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
    )
    made.normalizer = normalizers.Prepend(" ")
    made.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 1)])
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def merges(pieces: list[str], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the one that makes the highest score first."""
    text = [piece for piece in pieces[3:] if not piece.startswith("<0x")]
    known = set(text)
    pairs = [
        (piece[:cut], piece[cut:])
        for piece in text
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    return sorted(pairs, key=lambda pair: -scores["".join(pair)])
