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

_NAME = "_gradient_checkpointing_func"


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
