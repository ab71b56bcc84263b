"""Activation checkpointing: a recomputation sees the active set and the route of its own forward.

The checkpointing function that transformers stores on a module is read through a property that binds it to the state
at the time of the call, whether checkpointing was enabled before or after attach.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from graftwork.engine.seat import SEAT
from graftwork.engine.state import carrying
from graftwork.errors import BadOption

_NAME = "_gradient_checkpointing_func"


def enable_checkpointing(model: nn.Module, *, reentrant: bool = False) -> None:
    """Let a transformers model recompute its activations; BadOption where it cannot.

    Newer transformers call it activation checkpointing and warn at the older name.
    """
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        enable = getattr(model, name, None)
        if enable is not None:
            enable({"use_reentrant": reentrant})
            return
    raise BadOption(
        f"{type(model).__name__} cannot recompute its activations: it has no activation_checkpointing_enable(). "
        "Leave checkpointing out"
    )


def checkpoints(module: nn.Module) -> bool:
    """Whether a module can recompute its activations the way transformers does."""
    return hasattr(type(module), "gradient_checkpointing") or "gradient_checkpointing" in module.__dict__


def members(base: type) -> dict[str, Any]:
    """Class members that carry the state into recomputation."""

    def get(self: nn.Module) -> Callable[..., Any]:
        if _NAME not in self.__dict__:
            raise AttributeError(_NAME)
        stored = self.__dict__[_NAME]
        seat = self.__dict__.get(SEAT)
        if seat is None:
            return stored

        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return stored(carrying(seat.state, function), *args, **kwargs)

        return run

    def put(self: nn.Module, value: Any) -> None:
        self.__dict__[_NAME] = value

    return {_NAME: property(get, put)}
