"""Models with adapters whose tensors are large enough to show, and batches to compare them on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.engine.attach import attach
from graftwork.engine.verbs import active, route
from graftwork.reference.technique import Technique
from graftwork.techniques.prefix_tuning import PrefixTuning
from graftwork.techniques.prompt_tuning import PromptTuning
from graftwork.testing import tiny, tiny_batch

LENGTHS = {"a": 5, "b": 9}


def prefix(length: int, **options: Any) -> Technique:
    return PrefixTuning(length=length, hidden=None, **options)


def prompt(length: int, **options: Any) -> Technique:
    return PromptTuning(length=length, **options)


def grafted(
    name: str,
    make: Any,
    options: Mapping[str, Any] | None = None,
    factor: float = 1.0,
    lengths: Mapping[str, int] = LENGTHS,
    **technique: Any,
) -> nn.Module:
    """`tiny(name)` with weights times `factor` and adapters "a" (5 positions) and "b" (9), values large."""
    model = tiny(name, options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor if parameter.dim() > 1 else 1.0)
    generator = torch.Generator().manual_seed(1)
    for adapter, length in lengths.items():
        made = attach(model, make(length, **technique), name=adapter, head=False)
        for parameter in made.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def answer(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    out = model(**batch, **options)
    found = next(
        out[key] for key in ("logits", "last_hidden_state", "image_embeds") if out.get(key) is not None
    )
    return real(found, batch)


def real(values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Values at padded positions set to zero: nothing is promised there."""
    mask = batch.get("attention_mask")
    fits = mask is not None and values.dim() == 3 and values.shape[:2] == mask.shape
    return values * mask[..., None] if fits and "decoder_input_ids" not in batch else values


def rows_of(
    model: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str | None] = ("a", "b", None)
) -> Tensor:
    """Row i of the answers of adapter i, one adapter at a time."""
    rows = []
    for i, name in enumerate(names):
        with active(model, *([] if name is None else [name])):
            rows.append(answer(model, batch)[i])
    return torch.stack(rows)


def routed(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with route(model, ["a", "b"], torch.tensor([0, 1, -1])):
        return answer(model, batch)


def tokens(
    batch: int = 3, length: int = 7, seed: int = 3, left: Sequence[int] = (3, 0, 1)
) -> tuple[Tensor, Tensor]:
    """Ids and a mask with so many padded positions at the left of each row."""
    ids = torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.stack([(torch.arange(length) >= gap).long() for gap in left[:batch]])
    return ids, mask


def stepwise(model: nn.Module, ids: Tensor, mask: Tensor, first: int, size: int, cache: Any = None) -> Tensor:
    """Logits with a cache: `first` positions at once, then `size` at a time, positions along the mask."""
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits, start, stop = [], 0, first
    while start < ids.shape[1]:
        out = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=places[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        logits.append(out.logits)
        start, stop = stop, stop + size
    return torch.cat(logits, 1)


def whole(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    places = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits


def gap(left: Tensor, right: Tensor, mask: Tensor | None = None) -> float:
    apart = (left - right).abs()
    return (apart if mask is None else apart * mask[..., None]).max().item()


def batch_of(name: str) -> dict[str, Tensor]:
    return tiny_batch(name)
