"""The contract of a task: rows -> encoded examples -> batches -> metrics.

A run uses it in this order:

    task = make_task("text-classification", {"max_length": 128}).fit(splits.train)
    model, preprocessor = load_base("minilm", task=task.name, labels=task.labels or task.outputs)
    train = task.encode(splits.train, preprocessor, training=True)
    valid = task.encode(splits.validation, preprocessor)
    Trainer(data_collator=task.collator(preprocessor),
            compute_metrics=lambda p: task.metrics(p.predictions, p.label_ids, preprocessor),
            preprocess_logits_for_metrics=task.preprocess_logits, ...)

A task is a frozen dataclass: its fields are the options that a recipe spells, and after `fit` it also carries
the label names, which go to the adapter file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from graftwork.data.rows import Rows
from graftwork.errors import BadData
from graftwork.reference.technique import check_options

log = logging.getLogger(__name__)
Batch = dict[str, Tensor]
Item = dict[str, Any]
Collator = Callable[[Sequence[Item]], Batch]

IGNORED = -100  # label of positions that count neither in the loss nor in a metric


class Encoded(Dataset[Item]):
    """Examples ready for a collator.

    Attributes:
        items: one dict per example.
        truncated: how many rows lost tokens to the length limit.
        tokens_cut: how many tokens they lost together.
    """

    def __init__(self, items: Sequence[Item], truncated: int = 0, tokens_cut: int = 0) -> None:
        self.items, self.truncated, self.tokens_cut = items, truncated, tokens_cut

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Item:
        return self.items[number]

    def report(self) -> str:
        """One line about size and truncation."""
        cut = f", {self.truncated} truncated ({self.tokens_cut} tokens cut)" if self.truncated else ""
        return f"{len(self.items)} examples{cut}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Base of all tasks.

    Class attributes:
        name: what recipes and the command line call it.
        columns: the columns it needs, with what they hold; others are ignored.
        model_class: the transformers Auto class whose head fits.
        best_metric: the metric that selects the best checkpoint, and `greater_is_better` its direction.
        problem_type: value of `config.problem_type` for heads that read one.
        generates: evaluation needs `generate`: predictions are token ids, not logits.
        preprocessor: "text" (a tokenizer), "image" (an image processor) or "image-text" (both, `ImageText`).
    """

    name: ClassVar[str] = "task"
    columns: ClassVar[Mapping[str, str]] = {}
    optional_columns: ClassVar[Mapping[str, str]] = {}
    model_class: ClassVar[str]
    best_metric: ClassVar[str]
    greater_is_better: ClassVar[bool] = True
    problem_type: ClassVar[str | None] = None
    generates: ClassVar[bool] = False
    preprocessor: ClassVar[str] = "text"

    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_options(self)  # type: ignore[arg-type]

    @property
    def outputs(self) -> int | None:
        """Width of the head to load, None where the head is the vocabulary."""
        return None

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.labels))

    @property
    def label2id(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels)}

    def fit(self, train: Rows) -> Task:
        """The task with what it learns from the training rows (label names); most learn nothing."""
        return self

    def named(self, labels: tuple[str, ...]) -> Task:
        """The same task with these label names."""
        return replace(self, labels=labels)

    def encode(self, rows: Rows, preprocessor: Any, *, training: bool = False) -> Encoded:
        """Examples for these rows; logs what was truncated. `training` matters where that is randomised."""
        self.require(rows)
        encoded = self._encode(rows, preprocessor, training)
        if encoded.truncated:
            log.warning("%s: %s", rows.origin, encoded.report())
        return encoded

    def _encode(self, rows: Rows, preprocessor: Any, training: bool) -> Encoded:
        raise NotImplementedError

    def collator(self, preprocessor: Any) -> Collator:
        """A picklable function from examples to a padded batch of tensors with a key `labels`."""
        raise NotImplementedError

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, preprocessor: Any) -> dict[str, float]:
        """Scores of a whole evaluation set. `predictions` are what `preprocess_logits` returned, joined over
        batches and padded with -100 (or generated ids, where the task generates)."""
        raise NotImplementedError

    def preprocess_logits(self, logits: Any, labels: Tensor) -> Tensor:
        """What to keep of a batch's logits, so that evaluation memory does not grow with the vocabulary."""
        return first(logits)

    def generation(self) -> dict[str, Any]:
        """Arguments for `generate`, where the task generates."""
        return {}

    def options(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain JSON values."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in changed.items()}

    def require(self, rows: Rows) -> None:
        """BadData when rows are missing or a needed column is."""
        if not len(rows):
            raise BadData(f"{rows.origin} has no rows")
        for name, meaning in self.columns.items():
            if name not in rows:
                raise BadData(
                    f"{self.name} needs a column {name!r} ({meaning}); {rows.origin} has "
                    f"{', '.join(rows.names)}. Name it: columns={{{name!r}: 'a column of yours'}}"
                )


def first(logits: Any) -> Tensor:
    """The logits themselves, where a model also returns hidden states or caches."""
    return logits[0] if isinstance(logits, tuple | list) else logits
