"""Causal language modelling: plain text in blocks, or completions of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from graftwork.data.rows import Rows
from graftwork.errors import BadData
from graftwork.reference.technique import AtLeast
from graftwork.tasks.base import IGNORED, Collator, Encoded, Item, Task, first
from graftwork.tasks.padding import text_collator
from graftwork.tasks.scores import language_scores, token_scores
from graftwork.tasks.tokens import limit


@dataclass(frozen=True, kw_only=True)
class CausalLM(Task):
    """Rows with `text` are joined, an end mark behind each, and cut into blocks: the last may be shorter,
    nothing is lost. Rows with `prompt` and `completion` stay apart and only the completion counts in the
    loss: a prompt that is too long loses its beginning, a completion too long its end.

    Args:
        max_length: tokens per block, or the longest prompt and completion together.
    """

    name: ClassVar[str] = "causal-lm"
    optional_columns: ClassVar[Mapping[str, str]] = {
        "text": "plain text",
        "prompt": "what is given",
        "completion": "what is to be said",
    }
    model_class: ClassVar[str] = "AutoModelForCausalLM"
    best_metric: ClassVar[str] = "perplexity"
    greater_is_better: ClassVar[bool] = False

    max_length: Annotated[int, AtLeast(4)] = 256

    def require(self, rows: Rows) -> None:
        super().require(rows)
        if "text" not in rows and not {"prompt", "completion"} <= set(rows.names):
            raise BadData(
                f"{self.name} needs a column 'text', or 'prompt' and 'completion'; {rows.origin} has "
                f"{', '.join(rows.names)}"
            )

    def _encode(self, rows: Rows, preprocessor: Any, training: bool) -> Encoded:
        most = limit(preprocessor, self.max_length)
        if "prompt" in rows and "completion" in rows:
            return _completions(preprocessor, rows["prompt"], rows["completion"], most)
        return Encoded(_blocks(preprocessor, rows["text"], most))

    def collator(self, preprocessor: Any) -> Collator:
        return text_collator(preprocessor)

    def preprocess_logits(self, logits: Any, labels: Tensor) -> Tensor:
        """(batch, positions, 2): loss and rightness of each label, told by the position before; zeros at
        first."""
        scores = token_scores(first(logits)[:, :-1], labels[:, 1:])
        return torch.nn.functional.pad(scores, (0, 0, 1, 0))

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, preprocessor: Any) -> dict[str, float]:
        """Perplexity and accuracy per token."""
        return language_scores(predictions[:, 1:], labels[:, 1:])


def _ids(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    return found


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _blocks(tokenizer: Any, texts: Sequence[str], size: int) -> list[Item]:
    end = _end(tokenizer)
    stream: list[int] = []
    for ids in _ids(tokenizer, texts, special=True):
        stream += ids if ids[-1:] == end else ids + end
    cut = [stream[start : start + size] for start in range(0, len(stream), size)]
    if len(cut) > 1 and len(cut[-1]) == 1:
        cut[-1] = cut[-2][-1:] + cut[-1]  # a lone token has nothing to be predicted from
    return [_item(block, block) for block in cut]


def _completions(tokenizer: Any, prompts: Sequence[str], completions: Sequence[str], most: int) -> Encoded:
    given, said = _ids(tokenizer, prompts, special=True), _ids(tokenizer, completions, special=False)
    items, over = [], []
    for before, after in zip(given, said, strict=True):
        whole = after + _end(tokenizer)
        kept = whole[: most - 1]
        start = before[max(0, len(before) + len(kept) - most) :]
        items.append(_item(start + kept, [IGNORED] * len(start) + kept))
        over.append(len(before) + len(whole) - len(start) - len(kept))
    return Encoded(items, sum(cut > 0 for cut in over), sum(over))


def _item(ids: list[int], labels: list[int]) -> Item:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
