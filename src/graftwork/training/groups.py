"""Which tensors learn at which rate: factors come from the techniques, and vectors are never decayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn


@dataclass
class Group:
    """Parameters that share a learning-rate factor and a weight decay."""

    factor: float
    weight_decay: float
    parameters: list[nn.Parameter] = field(default_factory=list)


def grouped(model: nn.Module, factor: Callable[[str], float], weight_decay: float) -> list[Group]:
    """Groups of the trainable parameters, factor 1 first; `factor` takes a parameter's name in the model."""
    groups: dict[tuple[float, float], Group] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (factor(name), weight_decay if parameter.ndim > 1 else 0.0)
            groups.setdefault(key, Group(*key)).parameters.append(parameter)
    return sorted(groups.values(), key=lambda group: (group.factor != 1.0, group.factor, group.weight_decay))
