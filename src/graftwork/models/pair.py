"""A captioner out of two pretrained models by name: what a recipe's `model: {vision: ..., text: ...}` stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graftwork.errors import BadOption, NothingMatches
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
    tower, images = _vision(vision, dtype, pretrain)
    language, tokenizer = load_base(text, task=TEXT_TASK, dtype=dtype, pretrain=pretrain)
    _refuse_random(vision, tower, tower.base_model)
    _refuse_random(text, language, language)
    model = captioner(tower, language)
    return model, ImageText.of(model, tokenizer, images)


def _vision(name: str, dtype: torch.dtype | None, pretrain: bool) -> tuple[Any, Any]:
    """With a classifier, whose trunk has no pooler that the files lack; bare where the family has none (CLIP's)."""
    try:
        return load_base(name, task=VISION_TASK, dtype=dtype, pretrain=pretrain)
    except NothingMatches:
        return load_base(name, dtype=dtype, pretrain=pretrain)


def _refuse_random(name: str, model: nn.Module, used: nn.Module) -> None:
    """BadOption where parameters that are used are not in the base's files: they would be others at each loading."""
    parameters, taken = dict(model.named_parameters()), {id(parameter) for parameter in used.parameters()}
    random = [key for key in fresh_parameters(model) if key in parameters and id(parameters[key]) in taken]
    if random:
        raise BadOption(
            f"{name} lacks {', '.join(random[:3])}, which would start at random; take a base that has it"
        )
