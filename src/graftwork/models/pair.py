"""A captioner out of two pretrained models by name: what a recipe's `model: {vision: ..., text: ...}` stands for."""

from __future__ import annotations

import torch
from torch import nn

from graftwork.errors import BadOption
from graftwork.models.base import fresh_parameters, load_base
from graftwork.models.captioner import Captioner, captioner
from graftwork.models.readers import ImageText

VISION_TASK, TEXT_TASK = "image-classification", "causal-lm"


def load_pair(
    vision: str, text: str, *, dtype: torch.dtype | None = None, pretrain: bool = False
) -> tuple[Captioner, ImageText]:
    """A captioner with a fresh connector, and its tokenizer and image processor.

    Args:
        vision, text: a vision transformer and a decoder: small hosts, folders or hub names.
        dtype: of the weights; None keeps fp32.
        pretrain: make small hosts that are not in the cache yet.

    Raises what `load_base` raises, and BadOption where the two do not go together or one lacks weights of its own.
    """
    tower, images = load_base(vision, task=VISION_TASK, dtype=dtype, pretrain=pretrain)
    language, tokenizer = load_base(text, task=TEXT_TASK, dtype=dtype, pretrain=pretrain)
    _refuse_random(vision, tower, prefix=f"{tower.base_model_prefix}.")
    _refuse_random(text, language)
    model = captioner(tower, language)
    return model, ImageText.of(model, tokenizer, images)


def _refuse_random(name: str, model: nn.Module, prefix: str = "") -> None:
    """BadOption where parameters below `prefix` are not in the base's files: they would be others at each loading."""
    random = [parameter for parameter in fresh_parameters(model) if parameter.startswith(prefix)]
    if random:
        raise BadOption(
            f"{name} lacks {', '.join(random[:3])}, which would start at random; take a base that has it"
        )
