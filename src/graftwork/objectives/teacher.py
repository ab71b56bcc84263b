"""The teacher: the same model with its adapters switched off, no second copy of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.engine.attach import state_of
from graftwork.engine.state import Snapshot


def base_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """What the model answers to the batch with no adapter running, in eval mode, without gradient.

    Which adapters run, the route, each module's mode and the random numbers are afterwards as they were.
    Adapters merged into the base belong to it.
    """
    given = dict(batch)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        given.pop("labels", None)  # an encoder-decoder makes its decoder's input from them
    bare = state_of(model).turn(Snapshot((), None))  # no choice of the user's changes, not even for a moment
    with bare, torch.no_grad(), _at_rest(model):
        logits: Tensor | None = model(**given).get("logits")
    return logits


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Eval mode, and random numbers put back."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    try:
        with torch.random.fork_rng(devices=sorted(d.index for d in devices), device_type=kind):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
