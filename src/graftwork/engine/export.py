"""`save_pretrained` of an attached model."""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import nn

from graftwork.engine.seat import GRAFTS, seat_of

logger = logging.getLogger(__name__)


def is_adapter_key(key: str) -> bool:
    """Whether a state-dict key belongs to an adapter."""
    return GRAFTS in key.split(".")


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
        if seat.state.adapters:
            names = ", ".join(seat.state.adapters)
            logger.warning("save_pretrained writes the base model without its adapters (%s); use graftwork.save", names)
        state = {key: value for key, value in self.state_dict().items() if not is_adapter_key(key)}
        return base.save_pretrained(self, save_directory, state_dict=state, **kwargs)

    return {"save_pretrained": save_pretrained}
