"""Features of samples: with adapters, and of the bare base, which serve as queries.

B samples, T tokens, D width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftwork.continual.samples import Samples
from graftwork.engine.verbs import active, adapters
from graftwork.errors import BadOption, nearest

Pooling = Literal["first", "mean", "last"]


def hidden_states(output: Any) -> Tensor:
    """What a model's forward answers, (B, T, D) or (B, D, height, width) or (B, D)."""
    found = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
    if found is None:
        raise BadOption(
            f"continual learning puts its own head on the features, and {type(output).__name__} has none "
            "(last_hidden_state); load the model without a head (load_base(name), AutoModel)"
        )
    return found


def pooled(hidden: Tensor, inputs: Mapping[str, Tensor], pooling: Pooling) -> Tensor:
    """One vector (B, D) a sample: of the first position, of the last that is no padding, or their mean."""
    if hidden.dim() == 4:
        hidden = hidden.flatten(2).mT
    return hidden if hidden.dim() == 2 else _POOLED[pooling](hidden, _mask(hidden, inputs))


def features(model: nn.Module, inputs: Mapping[str, Tensor], pooling: Pooling) -> Tensor:
    """Features (B, D) with whatever is active or routed."""
    return pooled(hidden_states(model(**inputs)), inputs, pooling)


def queries(model: nn.Module, samples: Samples, pooling: Pooling, batch_size: int = 64) -> Tensor:
    """f0(x): features (n, D) of the base with all adapters off, in evaluation mode, without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), active(model) if adapters(model) else nullcontext():
            batches = (part.to(device_of(model)) for part in samples.batches(batch_size))
            parts = [features(model, part.inputs, pooling) for part in batches]
    finally:
        model.train(training)
    return torch.cat(parts)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


def check_pooling(pooling: str) -> None:
    """BadOption for a pooling that does not exist."""
    if pooling not in _POOLED:
        raise BadOption(f"no pooling is called {pooling!r}. {nearest(pooling, _POOLED)}")


def _mask(hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, T) 1 where a position is no padding."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.new_ones(hidden.shape[:2])
    return mask.to(hidden.dtype)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[:, 0]


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


_POOLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"first": _first, "mean": _mean, "last": _last}
