"""What makes images and text ready for a model that reads both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from graftwork.errors import BadOption


@dataclass(frozen=True)
class ImageText:
    """A tokenizer and an image processor, and how an image stands among tokens.

    Args:
        tokenizer, images: of the language model and the vision encoder.
        image_token: number of the token that stands for image rows. rows: positions of one image.
    """

    tokenizer: Any
    images: Any
    image_token: int
    rows: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any, images: Any) -> ImageText:
        """For a model that reads image rows among tokens (`Captioner`, LLaVA); BadOption for another."""
        config = model.config
        if not _reads_images(config):
            raise BadOption(f"{type(model).__name__} reads no images among tokens; make it by `captioner`")
        return cls._of(config, tokenizer, images)

    @classmethod
    def load(cls, folder: str) -> ImageText:
        """From a folder that holds a model, its tokenizer and its image processor; BadOption for another model."""
        config = AutoConfig.from_pretrained(folder)
        if not _reads_images(config):
            raise BadOption(f"{folder} holds a {config.model_type}, which reads no images among tokens")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return cls._of(config, tokenizer, AutoImageProcessor.from_pretrained(folder, backend="pil"))

    @classmethod
    def _of(cls, config: Any, tokenizer: Any, images: Any) -> ImageText:
        return cls(with_padding(tokenizer), images, config.image_token_id, config.image_seq_length)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both beside a saved model."""
        self.tokenizer.save_pretrained(folder)
        self.images.save_pretrained(folder)

    @property
    def image_ids(self) -> list[int]:
        """The tokens of one image."""
        return [self.image_token] * self.rows

    @property
    def end(self) -> list[int]:
        """The mark behind a text."""
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    def ids(self, text: str) -> list[int]:
        """A text's tokens, without marks."""
        return (
            list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
        )

    def pixels(self, image: np.ndarray) -> Tensor:
        """(channels, height, width) of an image (height, width, 3) uint8."""
        return self.images([image], return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]


def with_padding(tokenizer: Any) -> Any:
    """The tokenizer, padding with its end mark where it has no padding token of its own."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _reads_images(config: Any) -> bool:
    return getattr(config, "image_token_id", None) is not None and hasattr(config, "image_seq_length")
