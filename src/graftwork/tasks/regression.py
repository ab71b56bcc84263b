"""Regression: one number for a text or a pair of texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np

from graftwork.data.rows import Rows
from graftwork.errors import BadData
from graftwork.reference.technique import AtLeast
from graftwork.tasks.base import Collator, Encoded, Task
from graftwork.tasks.padding import text_collator
from graftwork.tasks.scores import regression_scores
from graftwork.tasks.tokens import encode_texts


@dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """The loss is the mean squared error.

    Args:
        max_length: longest input in tokens, both texts of a pair together.
    """

    name: ClassVar[str] = "regression"
    columns: ClassVar[Mapping[str, str]] = {"text": "the text", "label": "a number"}
    optional_columns: ClassVar[Mapping[str, str]] = {"pair": "a second text"}
    model_class: ClassVar[str] = "AutoModelForSequenceClassification"
    best_metric: ClassVar[str] = "pearson"
    problem_type: ClassVar[str | None] = "regression"

    max_length: Annotated[int, AtLeast(4)] = 256

    @property
    def outputs(self) -> int | None:
        return 1

    def _encode(self, rows: Rows, preprocessor: Any, training: bool) -> Encoded:
        values = numbers(rows["label"], rows.origin)
        encoded = encode_texts(preprocessor, rows["text"], rows.get("pair"), self.max_length)
        for item, value in zip(encoded.items, values, strict=True):
            item["labels"] = value
        return encoded

    def collator(self, preprocessor: Any) -> Collator:
        return text_collator(preprocessor)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, preprocessor: Any) -> dict[str, float]:
        """Pearson and Spearman correlation (0 where undefined), root mean square and mean absolute error."""
        return regression_scores(predictions.reshape(-1), labels.reshape(-1))


def numbers(values: Sequence[Any], origin: str) -> list[float]:
    """The values as finite numbers; BadData names the first row that is none."""
    found = []
    for row, value in enumerate(values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise BadData(f"{origin}: label {value!r} of row {row} is not a finite number")
        found.append(number)
    return found
