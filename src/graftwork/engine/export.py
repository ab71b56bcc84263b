"""`save_pretrained` of an attached model."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from graftwork.engine.seat import GRAFTS, seat_of
from graftwork.engine.state import State

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
    """A `save_pretrained` that writes the base as it is, so that `from_pretrained` finds no surprise.

    A caller that hands over a state dict, as transformers' Trainer does (None included), makes a checkpoint to resume
    from: it gets every tensor, adapters included.
    """
    if not hasattr(base, "save_pretrained"):
        return {}

    @functools.wraps(base.save_pretrained)
    def save_pretrained(self: nn.Module, save_directory: Any, **kwargs: Any) -> Any:
        seat = seat_of(self)
        if seat is None or "state_dict" in kwargs:
            return base.save_pretrained(self, save_directory, **kwargs)
        left_out = [name for name in seat.state.adapters if name not in seat.state.merged]
        if left_out:
            names = ", ".join(left_out)
            logger.warning(
                "save_pretrained writes the base model without its adapters (%s); use graftwork.save", names
            )
        state = {key: value for key, value in self.state_dict().items() if not is_adapter_key(key)}
        with _honest_about_ties(self, seat.state, state):
            return base.save_pretrained(self, save_directory, state_dict=state, **kwargs)

    return {"save_pretrained": save_pretrained}
