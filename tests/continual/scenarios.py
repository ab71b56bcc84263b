"""Small scenarios over tiny hosts: images whose classes are patterns, token ids whose classes are words."""

from __future__ import annotations

import torch
from torch import nn

from graftwork.continual import Samples, Scenario, by_classes, by_domains
from graftwork.testing import tiny


def host(name: str = "vit-base") -> nn.Module:
    return tiny(name)


def images(classes: int = 4, each: int = 12, seed: int = 0, shift: float = 0.0) -> Samples:
    """Noisy copies of one random picture per class, 16 x 16."""
    patterns = torch.randn(classes, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    noise = torch.randn(classes * each, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(classes).repeat_interleave(each)
    return Samples({"pixel_values": 2 * patterns[labels] + 0.3 * noise + shift}, labels)


def texts(classes: int = 4, each: int = 8, seed: int = 0) -> Samples:
    """Rows of 4 to 7 tokens drawn from ten words of their class, padded on the right."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(each)
    words = 3 + 10 * labels[:, None] + torch.randint(10, (len(labels), 7), generator=draw)
    mask = (torch.arange(7) < torch.randint(4, 8, (len(labels), 1), generator=draw)).long()
    return Samples({"input_ids": words * mask, "attention_mask": mask}, labels)


def split_images(tasks: int = 2) -> Scenario:
    return by_classes(images(), images(each=6, seed=1), groups=tasks)


def image_domains() -> Scenario:
    return by_domains(
        {f"shift {s:g}": (images(2, shift=s), images(2, each=6, seed=1, shift=s)) for s in (0.0, 3.0)}
    )
