"""Image classification: one label for an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from graftwork.data.rows import Rows
from graftwork.errors import BadData
from graftwork.tasks.base import Collator, Encoded, Item, Task
from graftwork.tasks.labels import label_names, label_numbers
from graftwork.tasks.padding import PadCollator
from graftwork.tasks.scores import classification_scores


@dataclass(frozen=True, kw_only=True)
class ImageClassification(Task):
    """Images are made ready one by one when they are asked for: pixels of a whole data set need not fit
    in memory."""

    name: ClassVar[str] = "image-classification"
    columns: ClassVar[Mapping[str, str]] = {"image": "a file or an array", "label": "its label"}
    model_class: ClassVar[str] = "AutoModelForImageClassification"
    best_metric: ClassVar[str] = "accuracy"
    problem_type: ClassVar[str | None] = "single_label_classification"
    preprocessor: ClassVar[str] = "image"

    @property
    def outputs(self) -> int | None:
        return len(self.labels)

    def fit(self, train: Rows) -> Task:
        self.require(train)
        return self if self.labels else self.named(label_names(train["label"], train.origin))

    def _encode(self, rows: Rows, preprocessor: Any, training: bool) -> Encoded:
        numbers = label_numbers(rows["label"], self.labels, rows.origin)
        items = [{"image": image, "labels": n} for image, n in zip(rows["image"], numbers, strict=True)]
        check_images(rows["image"], rows.origin)
        return Images(items, preprocessor)

    def collator(self, preprocessor: Any) -> Collator:
        return PadCollator()

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, preprocessor: Any) -> dict[str, float]:
        """Accuracy, macro F1 and Matthews correlation."""
        return classification_scores(predictions.argmax(-1), labels)


class Images(Encoded):
    """Examples whose pixels are computed when asked for."""

    def __init__(self, items: Sequence[Item], processor: Any) -> None:
        super().__init__(items)
        self.processor = processor

    def __getitem__(self, number: int) -> Item:
        item = self.items[number]
        pixels = self.processor([rgb(item["image"])], return_tensors="pt", input_data_format="channels_last")
        return {"pixel_values": pixels["pixel_values"][0], "labels": item["labels"]}


def rgb(image: Any) -> np.ndarray:
    """(height, width, 3) uint8, from a file, a PIL image, or an array: grey, one to four channels last;
    numbers 0 to 255, or fractions from 0 to 1."""
    from PIL import Image

    if isinstance(image, str):
        with Image.open(image) as opened:
            return np.asarray(opened.convert("RGB"))
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    values = np.asarray(image)
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4):
        raise BadData(
            f"an image of shape {values.shape}; expected (height, width) or (height, width, 1, 3 or 4)"
        )
    grey = values.shape[2] == 1
    return _bytes(values.repeat(3, axis=2) if grey else values[:, :, :3])


def _bytes(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind in "fb" and low >= 0 and high <= 1:
        return (values * 255.0).round().astype(np.uint8)
    if low >= 0 and high <= 255:
        return values.round().astype(np.uint8)
    raise BadData(
        f"an image with values from {low:g} to {high:g}; expected 0 to 255, or fractions from 0 to 1"
    )


def check_images(images: Sequence[Any], origin: str) -> None:
    """BadData for the first file that is no image, before training starts; reads headers only."""
    from PIL import Image

    for row, image in enumerate(images):
        if isinstance(image, str):
            try:
                Image.open(image).close()
            except OSError as error:
                raise BadData(f"{origin}: row {row}: {image} is not a readable image: {error}") from None
        elif row == 0:
            rgb(image)
