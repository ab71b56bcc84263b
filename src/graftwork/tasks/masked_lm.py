"""Masked language modelling (Devlin et al. 2019, arXiv:1810.04805, section 3.1): of the chosen tokens 80
% become the mask, 10 % a random token, 10 % stay; all chosen ones are predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from graftwork.data.rows import Rows
from graftwork.errors import BadData
from graftwork.reference.technique import AtLeast, Between
from graftwork.tasks.base import IGNORED, Batch, Collator, Encoded, Item, Task, first
from graftwork.tasks.padding import PadCollator, text_collator
from graftwork.tasks.scores import language_scores, token_scores
from graftwork.tasks.tokens import encode_texts

_EVALUATION_SEED = 0


@dataclass(frozen=True, kw_only=True)
class MaskedLM(Task):
    """Training draws new masks for each batch; evaluation masks are drawn once, so that scores compare.

    Args:
        max_length: longest text in tokens.
        share: of the tokens that are predicted.
    """

    name: ClassVar[str] = "masked-lm"
    columns: ClassVar[Mapping[str, str]] = {"text": "plain text"}
    model_class: ClassVar[str] = "AutoModelForMaskedLM"
    best_metric: ClassVar[str] = "perplexity"
    greater_is_better: ClassVar[bool] = False

    max_length: Annotated[int, AtLeast(4)] = 256
    share: Annotated[float, Between(0, 1)] = 0.15

    def _encode(self, rows: Rows, preprocessor: Any, training: bool) -> Encoded:
        encoded = encode_texts(preprocessor, rows["text"], None, self.max_length)
        if not training:
            masker = self._masker(preprocessor)
            generator = torch.Generator().manual_seed(_EVALUATION_SEED)
            for item in encoded.items:
                item.update(masker.mask(item["input_ids"], generator))
        return encoded

    def collator(self, preprocessor: Any) -> Collator:
        return MaskCollator(self._masker(preprocessor), text_collator(preprocessor))

    def _masker(self, tokenizer: Any) -> Masker:
        if tokenizer.mask_token_id is None:
            raise BadData("masked-lm needs a tokenizer with a mask token; this one has none. Try causal-lm.")
        return Masker(tokenizer.mask_token_id, len(tokenizer), tuple(tokenizer.all_special_ids), self.share)

    def preprocess_logits(self, logits: Any, labels: Tensor) -> Tensor:
        """(batch, positions, 2): loss and rightness of each label."""
        return token_scores(first(logits), labels)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, preprocessor: Any) -> dict[str, float]:
        """Perplexity and accuracy per masked token."""
        return language_scores(predictions, labels)


@dataclass(frozen=True)
class Masker:
    """Args: number of the mask token, size of the vocabulary, tokens never chosen, share of tokens chosen."""

    mask_token: int
    vocabulary: int
    special: tuple[int, ...]
    share: float

    def mask(self, tokens: Sequence[int], generator: torch.Generator | None = None) -> dict[str, list[int]]:
        """New `input_ids` and `labels`. At least one token is chosen, if any may be."""
        ids = torch.tensor(tokens)
        allowed = ~torch.isin(ids, torch.tensor(self.special))
        draw = torch.rand(len(ids), generator=generator).masked_fill(~allowed, 2.0)
        chosen = allowed & ((draw < self.share) | (draw == draw.min()))
        fate = torch.rand(len(ids), generator=generator)
        anything = torch.randint(self.vocabulary, (len(ids),), generator=generator)
        labels = torch.where(chosen, ids, IGNORED)
        ids = torch.where(chosen & (fate < 0.8), self.mask_token, ids)
        ids = torch.where(chosen & (fate >= 0.9), anything, ids)
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}


@dataclass(frozen=True)
class MaskCollator:
    """Mask the examples that have no masks yet, then pad."""

    masker: Masker
    pad: PadCollator

    def __call__(self, items: Sequence[Item]) -> Batch:
        return self.pad(
            [item if "labels" in item else item | self.masker.mask(item["input_ids"]) for item in items]
        )
