"""The order in which samples are seen: batches of like length, for less padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from graftwork.errors import BadRecipe
from graftwork.tasks.base import Encoded

WINDOW = 50  # batches sorted together: enough to be even, few enough to stay random


class ByLength(Sampler[int]):
    """Numbers of all samples, shuffled in such a way that a batch holds samples of like length.

    The order follows from seed and epoch alone, so that an interrupted run goes on in it.

    Args:
        lengths: of each sample, in tokens.
        batch_size: samples per optimiser step, over all processes.
        seed: of the run.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._size, self._seed, self._epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each pass."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        numbers = torch.randperm(len(self), generator=generator).tolist()
        window = self._size * WINDOW
        starts = range(0, len(self), window)
        batches = [batch for start in starts for batch in self._batches(numbers[start : start + window])]
        whole = len(self) // self._size  # a batch that is not full stays last
        shuffled = torch.randperm(whole, generator=generator).tolist()
        for place in [*shuffled, *range(whole, len(batches))]:
            yield from batches[place]

    def _batches(self, numbers: Sequence[int]) -> list[list[int]]:
        ordered = sorted(numbers, key=self._lengths.__getitem__)
        return [ordered[start : start + self._size] for start in range(0, len(ordered), self._size)]


def lengths(examples: Encoded) -> list[int]:
    """Tokens of each example; raises BadRecipe where examples have none."""
    if "input_ids" not in examples[0]:
        raise BadRecipe("training.order: length needs samples of tokens, and these have none; use random")
    return [len(item["input_ids"]) for item in examples.items]
