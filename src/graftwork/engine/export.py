"""What transformers asks of a model it saves or trains."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from graftwork.engine.seat import GRAFTS, Seat, seat_of
from graftwork.engine.state import State

_LOADED = "_hf_peft_config_loaded"
logger = logging.getLogger(__name__)


def is_adapter_key(key: str) -> bool:
    """Whether a state-dict key belongs to an adapter."""
    return GRAFTS in key.split(".")


@contextmanager
def _honest_about_ties(model: nn.Module, state: State, tensors: dict[str, Tensor]) -> Iterator[None]:
    """While writing, the configuration does not claim a tie that merging has split: converters trust it."""
    config: Any = getattr(model, "config", None)
    split = any(shared is not None for _, shared in state.originals.values())
    ties_left = len({tensor.data_ptr() for tensor in tensors.values()}) < len(tensors)
    if not split or ties_left or not getattr(config, "tie_word_embeddings", False):
        yield
        return
    config.tie_word_embeddings = False
    try:
        yield
    finally:
        config.tie_word_embeddings = True


def members(base: type) -> dict[str, Any]:
    """What transformers' saving and its Trainer ask of a model, answered for an attached one."""
    return {**_saving(base), **_permission(base)}


def _saving(base: type) -> dict[str, Any]:
    """A `save_pretrained` that writes the base as it is, so that `from_pretrained` finds no surprise.

    A caller that hands over a state dict, as transformers' Trainer does (None included), makes a checkpoint
    to resume from: it gets every tensor, adapters included.
    """
    if not hasattr(base, "save_pretrained"):
        return {}

    @functools.wraps(base.save_pretrained)
    def save_pretrained(self: nn.Module, save_directory: Any, **kwargs: Any) -> Any:
        seat = seat_of(self)
        if seat is None:
            return base.save_pretrained(self, save_directory, **kwargs)
        before, seat.saving = seat.saving, True
        try:
            if "state_dict" in kwargs:
                return base.save_pretrained(self, save_directory, **kwargs)
            state = _base_only(self, seat)
            with _honest_about_ties(self, seat.state, state):
                return base.save_pretrained(self, save_directory, state_dict=state, **kwargs)
        finally:
            seat.saving = before

    return {"save_pretrained": save_pretrained}


def _base_only(model: nn.Module, seat: Seat) -> dict[str, Any]:
    left_out = [name for name in seat.state.adapters if name not in seat.state.merged]
    if left_out:
        names = ", ".join(left_out)
        logger.warning(
            "save_pretrained writes the base model without its adapters (%s); use graftwork.save", names
        )
    return {key: value for key, value in model.state_dict().items() if not is_adapter_key(key)}


def _permission(base: type) -> dict[str, Any]:
    """Trainer trains a quantised base only where this flag says that something trainable is on top; while
    saving, the same flag would choose another file format."""
    if not hasattr(base, _LOADED):
        return {}

    def get(self: nn.Module) -> bool:
        seat = seat_of(self)
        ours = seat is not None and seat.root and bool(seat.state.adapters) and not seat.saving
        return self.__dict__.get(_LOADED, False) or (ours and getattr(self, "is_quantized", False))

    def put(self: nn.Module, value: bool) -> None:
        self.__dict__[_LOADED] = value

    return {_LOADED: property(get, put)}
