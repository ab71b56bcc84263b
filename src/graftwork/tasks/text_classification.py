"""Text classification: one label for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np

from graftwork.data.rows import Rows
from graftwork.reference.technique import AtLeast
from graftwork.tasks.base import Collator, Encoded, Task
from graftwork.tasks.labels import label_names, label_numbers
from graftwork.tasks.padding import text_collator
from graftwork.tasks.scores import classification_scores
from graftwork.tasks.tokens import encode_texts


@dataclass(frozen=True, kw_only=True)
class TextClassification(Task):
    """Args:
    max_length: longest input in tokens, both texts of a pair together.
    """

    name: ClassVar[str] = "text-classification"
    columns: ClassVar[Mapping[str, str]] = {"text": "the text", "label": "its label"}
    optional_columns: ClassVar[Mapping[str, str]] = {"pair": "a second text"}
    model_class: ClassVar[str] = "AutoModelForSequenceClassification"
    best_metric: ClassVar[str] = "accuracy"
    problem_type: ClassVar[str | None] = "single_label_classification"

    max_length: Annotated[int, AtLeast(4)] = 256

    @property
    def outputs(self) -> int | None:
        return len(self.labels)

    def fit(self, train: Rows) -> Task:
        self.require(train)
        return self if self.labels else self.named(label_names(train["label"], train.origin))

    def _encode(self, rows: Rows, preprocessor: Any, training: bool) -> Encoded:
        numbers = label_numbers(rows["label"], self.labels, rows.origin)
        encoded = encode_texts(preprocessor, rows["text"], rows.get("pair"), self.max_length)
        for item, number in zip(encoded.items, numbers, strict=True):
            item["labels"] = number
        return encoded

    def collator(self, preprocessor: Any) -> Collator:
        return text_collator(preprocessor)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, preprocessor: Any) -> dict[str, float]:
        """Accuracy, macro F1 and Matthews correlation."""
        return classification_scores(predictions.argmax(-1), labels)
