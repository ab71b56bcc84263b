"""What a small host is pretrained on: batches for its objective by a seed, and a fixed validation set."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any, Protocol

import torch
from torch import Tensor

from graftwork.data import embedded
from graftwork.models.hosts import EOS, SENTINELS, Host
from graftwork.models.spans import continued, corrupt
from graftwork.models.vocabulary import train_tokenizer
from graftwork.tasks.base import IGNORED, Batch
from graftwork.tasks.padding import pad

_VALIDATION_BATCHES = 12


class Lessons(Protocol):
    """Data of one objective.

    Attributes:
        preprocessor: tokenizer or image processor, saved beside the weights.
        baseline: loss per label (nats) of a model that knows only how often each label occurs.
        size: training tokens or images.
    """

    preprocessor: Any
    baseline: float
    size: int

    def batch(self, rng: random.Random) -> Batch: ...

    def validation(self) -> list[Batch]: ...


def lessons(host: Host) -> Lessons:
    """The lessons for a host's objective."""
    return ImageLessons(host) if host.objective == "images" else TextLessons(host)


class TextLessons:
    """Windows of a fixed length out of the embedded text, texts separated by <eos>."""

    def __init__(self, host: Host) -> None:
        texts = {split: embedded.text(split)["text"] for split in ("train", "validation")}
        self.preprocessor = train_tokenizer(texts["train"], sentinels=host.objective == "spans")
        self._train, self._valid = (self._stream(texts[split]) for split in ("train", "validation"))
        self._host, self.size = host, len(self._train)
        self._sentinels = self.preprocessor.convert_tokens_to_ids(
            [f"<extra_id_{n}>" for n in range(SENTINELS)] if host.objective == "spans" else []
        )
        self.baseline = unigram_loss(self._train, self._valid)

    def batch(self, rng: random.Random) -> Batch:
        starts = [rng.randrange(len(self._train) - self._host.length) for _ in range(self._host.batch)]
        return self._examples(self._train, starts, rng)

    def validation(self) -> list[Batch]:
        rng, length, size = random.Random(0), self._host.length, self._host.batch
        spread = (len(self._valid) - length) // (_VALIDATION_BATCHES * size)
        starts = [n * spread for n in range(_VALIDATION_BATCHES * size)]
        return [self._examples(self._valid, starts[n : n + size], rng) for n in range(0, len(starts), size)]

    def _stream(self, texts: Sequence[str]) -> list[int]:
        encoded = self.preprocessor(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [token for ids in encoded for token in (*ids, EOS)]

    def _examples(self, stream: Sequence[int], starts: Sequence[int], rng: random.Random) -> Batch:
        windows = [stream[start : start + self._host.length] for start in starts]
        if self._host.objective == "causal":
            tokens = torch.tensor(windows)
            return {"input_ids": tokens, "labels": tokens}
        kinds = (corrupt, continued)  # alternating: one gives understanding, the other many labels
        pairs = [kinds[n % 2](window, self._sentinels, rng) for n, window in enumerate(windows)]
        sources = pad([[*source, EOS] for source, _ in pairs], -1)
        labels = pad([[*target, EOS] for _, target in pairs], IGNORED)
        seen = sources >= 0
        return {"input_ids": sources.clamp(min=0), "attention_mask": seen.long(), "labels": labels}


@dataclass
class ImageLessons:
    """The digits 0 to 4; training images are shifted by up to a tenth of their side."""

    host: Host
    baseline: float = log(5)

    def __post_init__(self) -> None:
        self.preprocessor = _image_processor(self.host.length)
        parts = {split: embedded.digits(split, classes=range(5)) for split in ("train", "validation")}
        pixels = {split: self._pixels(rows["image"]) for split, rows in parts.items()}
        self._train = pixels["train"], torch.tensor(parts["train"]["label"])
        self._valid = pixels["validation"], torch.tensor(parts["validation"]["label"])
        self.size = len(parts["train"])

    def batch(self, rng: random.Random) -> Batch:
        images, labels = self._train
        chosen = torch.tensor([rng.randrange(len(labels)) for _ in range(self.host.batch)])
        most = self.host.length // 10
        moved = [
            images[n].roll((rng.randint(-most, most), rng.randint(-most, most)), (1, 2))
            for n in chosen.tolist()
        ]
        return {"pixel_values": torch.stack(moved), "labels": labels[chosen]}

    def validation(self) -> list[Batch]:
        images, labels = self._valid
        return [{"pixel_values": images, "labels": labels}]

    def _pixels(self, images: Sequence[Any]) -> Tensor:
        colour = [image[:, :, None].repeat(3, axis=2) for image in images]
        made = self.preprocessor(colour, return_tensors="pt", input_data_format="channels_last")
        pixels: Tensor = made["pixel_values"]
        return pixels


def unigram_loss(train: Sequence[int], valid: Sequence[int]) -> float:
    """Nats per token of `valid` under the (add-one) frequencies of `train`."""
    counts, kinds = Counter(train), len(set(train) | set(valid))
    total = len(train) + kinds
    return -sum(n * log((counts[token] + 1) / total) for token, n in Counter(valid).items()) / len(valid)


def _image_processor(side: int) -> Any:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    grey = [0.5, 0.5, 0.5]
    return ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=grey, image_std=grey)
