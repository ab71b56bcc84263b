"""Sequence to sequence: one text in, another out (summaries, translation, data to text)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from torch import Tensor

from graftwork.data.rows import Rows
from graftwork.reference.technique import AtLeast
from graftwork.tasks.base import IGNORED, Collator, Encoded, Task, first
from graftwork.tasks.overlap import bleu, exact_match, rouge_l
from graftwork.tasks.padding import text_collator
from graftwork.tasks.tokens import encode_texts


@dataclass(frozen=True, kw_only=True)
class Seq2Seq(Task):
    """Scores compare generated texts with the targets.

    Args:
        prefix: put before every source ("summarize: " for models trained so).
        max_length, max_target_length: longest source and target in tokens; generation stops at the latter.
        beams: width of the beam search when generating; 1 is greedy.
    """

    name: ClassVar[str] = "seq2seq"
    columns: ClassVar[Mapping[str, str]] = {"source": "the text given", "target": "the text wanted"}
    model_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    best_metric: ClassVar[str] = "rouge_l"
    generates: ClassVar[bool] = True

    prefix: str = ""
    max_length: Annotated[int, AtLeast(4)] = 256
    max_target_length: Annotated[int, AtLeast(2)] = 64
    beams: Annotated[int, AtLeast(1)] = 1

    def _encode(self, rows: Rows, preprocessor: Any, training: bool) -> Encoded:
        sources = [self.prefix + text for text in rows["source"]]
        encoded = encode_texts(preprocessor, sources, None, self.max_length)
        targets = encode_texts(preprocessor, rows["target"], None, self.max_target_length)
        items = [
            {
                "input_ids": one["input_ids"],
                "attention_mask": one["attention_mask"],
                "labels": two["input_ids"],
            }
            for one, two in zip(encoded.items, targets.items, strict=True)
        ]
        return Encoded(items, encoded.truncated + targets.truncated, encoded.tokens_cut + targets.tokens_cut)

    def collator(self, preprocessor: Any) -> Collator:
        return text_collator(preprocessor)

    def generation(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_target_length, "num_beams": self.beams}

    def preprocess_logits(self, logits: Any, labels: Tensor) -> Tensor:
        """The likeliest token at each position, for evaluation that does not generate."""
        return first(logits).argmax(-1)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, preprocessor: Any) -> dict[str, float]:
        """ROUGE-L, BLEU and exact match, between 0 and 1."""
        said, wanted = decode(preprocessor, predictions), decode(preprocessor, labels)
        return {
            "rouge_l": float(np.mean([rouge_l(a, b) for a, b in zip(said, wanted, strict=True)])),
            "bleu": bleu(said, wanted),
            "exact_match": float(np.mean([exact_match(a, b) for a, b in zip(said, wanted, strict=True)])),
        }


def decode(tokenizer: Any, ids: np.ndarray) -> Sequence[str]:
    """Texts without special tokens; ignored positions count as padding."""
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts = tokenizer.batch_decode(np.where(ids == IGNORED, fill, ids), skip_special_tokens=True)
    return [text.strip() for text in texts]
