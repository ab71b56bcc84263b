"""Examples of different lengths made into one batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graftwork.tasks.base import IGNORED, Batch, Item


@dataclass(frozen=True)
class PadCollator:
    """Pad every list-valued key on the right to the longest of the batch; stack everything else.

    Args:
        padding: key -> value to fill with (`input_ids` with the tokenizer's padding id); other keys get 0.
    """

    padding: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, items: Sequence[Item]) -> Batch:
        return {key: self._join(key, [item[key] for item in items]) for key in items[0]}

    def _join(self, key: str, values: Sequence[object]) -> Tensor:
        if isinstance(values[0], list):
            return pad(values, self.padding.get(key, 0))  # type: ignore[arg-type]
        return torch.stack([torch.as_tensor(value) for value in values])


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(rows, longest) int64, filled on the right with `value`."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def text_collator(tokenizer: object) -> PadCollator:
    """Padding as the tokenizer means it, labels with the ignored value."""
    fill = getattr(tokenizer, "pad_token_id", None)
    return PadCollator({"input_ids": 0 if fill is None else fill, "labels": IGNORED})
