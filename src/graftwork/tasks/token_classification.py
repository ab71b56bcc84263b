"""Token classification: one tag per word (parts of speech, named entities)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from torch import Tensor

from graftwork.data.rows import Rows
from graftwork.errors import BadData
from graftwork.reference.technique import AtLeast
from graftwork.tasks.base import IGNORED, Collator, Encoded, Item, Task, first
from graftwork.tasks.labels import label_names, label_numbers
from graftwork.tasks.padding import text_collator
from graftwork.tasks.scores import classification_scores
from graftwork.tasks.spans import is_span_scheme, span_scores
from graftwork.tasks.tokens import limit


@dataclass(frozen=True, kw_only=True)
class TokenClassification(Task):
    """The first piece of a word carries its tag; the pieces behind it do not count.

    Args:
        max_length: longest sentence in tokens; words beyond it are cut, and counted as truncation.
    """

    name: ClassVar[str] = "token-classification"
    columns: ClassVar[Mapping[str, str]] = {"tokens": "list of words", "tags": "list of their tags"}
    model_class: ClassVar[str] = "AutoModelForTokenClassification"
    best_metric: ClassVar[str] = "accuracy"

    max_length: Annotated[int, AtLeast(4)] = 256

    @property
    def outputs(self) -> int | None:
        return len(self.labels)

    def fit(self, train: Rows) -> Task:
        self.require(train)
        tags = [tag for sentence in train["tags"] for tag in sentence]
        return self if self.labels else self.named(label_names(tags, train.origin))

    def _encode(self, rows: Rows, preprocessor: Any, training: bool) -> Encoded:
        sentences, tags = rows["tokens"], rows["tags"]
        _same_lengths(sentences, tags, rows.origin)
        most = limit(preprocessor, self.max_length)
        words = [list(sentence) for sentence in sentences]
        split: dict[str, Any] = {"is_split_into_words": True, "verbose": False}
        lengths = [len(ids) for ids in preprocessor(words, **split)["input_ids"]]
        encoded = preprocessor(words, truncation=True, max_length=most, **split)
        items = [self._item(encoded, n, tags[n], rows.origin) for n in range(len(words))]
        over = [length - most for length in lengths if length > most]
        return Encoded(items, len(over), sum(over))

    def _item(self, encoded: Any, number: int, tags: Sequence[Any], origin: str) -> Item:
        numbers = label_numbers(tags, self.labels, f"{origin}, sentence {number}")
        words = encoded.word_ids(number)
        labels = [
            IGNORED if word is None or word == before else numbers[word]
            for before, word in zip([None, *words], words, strict=False)
        ]
        return {key: encoded[key][number] for key in encoded} | {"labels": labels}

    def collator(self, preprocessor: Any) -> Collator:
        return text_collator(preprocessor)

    def preprocess_logits(self, logits: Any, labels: Tensor) -> Tensor:
        return first(logits).argmax(-1)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, preprocessor: Any) -> dict[str, float]:
        """Accuracy, macro F1 and Matthews over the words; with BIO tags also precision, recall and F1 of
        spans."""
        counted = labels != IGNORED
        scores = classification_scores(predictions[counted], labels[counted])
        if is_span_scheme(self.labels):
            scores |= span_scores(self._names(predictions, counted), self._names(labels, counted))
        return scores

    def _names(self, numbers: np.ndarray, counted: np.ndarray) -> list[list[str]]:
        return [[self.labels[n] for n in row[keep]] for row, keep in zip(numbers, counted, strict=True)]


def _same_lengths(sentences: Sequence[Any], tags: Sequence[Any], origin: str) -> None:
    for row, (words, marks) in enumerate(zip(sentences, tags, strict=True)):
        if isinstance(words, str) or isinstance(marks, str):
            raise BadData(f"{origin}: row {row}: tokens and tags must be lists, one entry per word")
        if len(words) != len(marks):
            raise BadData(f"{origin}: row {row} has {len(words)} tokens and {len(marks)} tags")
