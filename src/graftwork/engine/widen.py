"""Making room for a prefix in what attention is given: keys, values, mask, position bias.

How an implementation reads its mask is its own affair, so there is one function for each way.

    B samples, H heads, Q query positions, K key positions, N prefix positions, D head width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.engine.prefix import Prefix
from graftwork.errors import PortUnavailable, StateError


@dataclass(frozen=True)
class Call:
    """What attention is given: query (B, heads, Q, D), key and value (B, H, K, D), mask, options."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]


def prepend(module: nn.Module, path: str, name: str, extra: Prefix, call: Call) -> Call:
    """The call with the prefix in front, as the implementation `name` reads its arguments."""
    if call.options.get("cache") is not None or name.startswith("paged|"):
        raise PortUnavailable(
            f"{path}: a paged cache takes in the keys behind the attention interface, so no prefix can stand "
            "in front of them; generate with another cache"
        )
    ready = _reader(name, path)(module, path, extra, call)
    return replace(
        ready,
        key=torch.cat([extra.keys, ready.key], dim=2),
        value=torch.cat([extra.values, ready.value], dim=2),
        options=_with_bias(ready, extra, ready.key),
    )


def _reader(name: str, path: str) -> Callable[[nn.Module, str, Prefix, Call], Call]:
    if name in ("eager", "sdpa"):
        return _eager if name == "eager" else _sdpa
    if "flash" in name:
        return _flash
    raise PortUnavailable(
        f"{path}: no prefix with attention implementation {name!r}; "
        "choose another one: model.set_attn_implementation('sdpa')"
    )


def _eager(module: nn.Module, path: str, extra: Prefix, call: Call) -> Call:
    """Eager adds its mask to the scores, and None is no mask at all."""
    wide = _wide_mask(call.mask, extra, call.key)
    if wide is not None and wide.dtype == torch.bool:
        zero = call.query.new_zeros(())
        wide = torch.where(wide, zero, _closed(zero))
    return replace(call, mask=wide)


def _sdpa(module: nn.Module, path: str, extra: Prefix, call: Call) -> Call:
    """For sdpa, None may mean causal, aligned at the first key: keys beyond the queries (an empty static
    cache) are cut off there. Keys in front would move that alignment, so the triangle is written out."""
    key, value, mask, length = call.key, call.value, call.mask, call.query.shape[2]
    asked = call.options.get("is_causal")
    causal = getattr(module, "is_causal", True) if asked is None else asked
    if mask is None and causal and length > 1:
        key, value = key[:, :, :length], value[:, :, :length]
        mask = torch.ones(length, length, dtype=torch.bool, device=key.device).tril()[None, None]
    return replace(call, key=key, value=value, mask=_wide_mask(mask, extra, key))


def _flash(module: nn.Module, path: str, extra: Prefix, call: Call) -> Call:
    """Flash attention reads a mask (B, K) and aligns causality at the last key: a prefix fits in front."""
    window = call.options.get("sliding_window")
    if window is not None and window < call.key.shape[2]:
        raise PortUnavailable(
            f"{path}: flash attention's sliding window of {window} would cut off the prefix of a sequence of "
            f"{call.key.shape[2]}; use model.set_attn_implementation('sdpa')"
        )
    _refuse_packed(path, call)
    options = {**call.options, "sliding_window": None, "position_ids": None}
    return replace(call, mask=_wide_rows(call.mask, extra, call.key), options=options)


def _refuse_packed(path: str, call: Call) -> None:
    positions = call.options.get("position_ids")
    packed = any(call.options.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    if not packed and call.mask is None and positions is not None and call.query.shape[2] > 1:
        packed = not torch.compiler.is_compiling() and bool((positions.diff(dim=-1) != 1).any())
    if packed:
        raise StateError(
            f"{path}: packed sequences in flash attention cannot hold a prefix for each; "
            "pad them into rows instead, or use model.set_attn_implementation('sdpa')"
        )


def _wide_rows(mask: Any, extra: Prefix, key: Tensor) -> Tensor | None:
    """(B, N + K): a padding mask with the prefix's columns in front."""
    if mask is None and extra.seen is None:
        return None
    shape = (key.shape[0], key.shape[2])
    rows = key.new_ones(shape, dtype=torch.bool) if mask is None else mask
    seen = rows.new_ones(shape[0], extra.length) if extra.seen is None else extra.seen.to(rows.dtype)
    return torch.cat([seen, rows], dim=1)


def _wide_mask(mask: Tensor | None, extra: Prefix, key: Tensor) -> Tensor | None:
    """(B or 1, H or 1, Q or 1, N + K) of a mask that is bool (true: seen) or added to the scores."""
    if mask is None:
        if extra.seen is None:
            return None
        mask = key.new_ones(1, 1, 1, key.shape[2], dtype=torch.bool)
    mask = mask[..., : key.shape[2]]
    if extra.seen is None:
        return torch.cat([_open(mask, (*mask.shape[:-1], extra.length)), mask], dim=-1)
    mask = mask.expand(key.shape[0], -1, -1, -1)
    shown = extra.seen[:, None, None].expand(*mask.shape[:-1], -1)
    if mask.dtype != torch.bool:
        shown = _open(mask, shown.shape).masked_fill(~shown, _closed(mask))
    return torch.cat([shown, mask], dim=-1)


def _open(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    return mask.new_ones(shape) if mask.dtype == torch.bool else mask.new_zeros(shape)


def _closed(mask: Tensor) -> float:
    return torch.finfo(mask.dtype).min


def _with_bias(call: Call, extra: Prefix, key: Tensor) -> dict[str, Any]:
    """T5's bias by relative position, on a copy since layers share it: none for a prefix nobody counted."""
    bias = call.options.get("position_bias")
    if bias is None:
        return call.options
    bias = bias[..., : key.shape[2]]
    if extra.shift is None:
        return {**call.options, "position_bias": functional.pad(bias, (extra.length, 0))}
    columns = extra.shift.columns(call.query.shape[2], extra.length).to(bias.dtype)
    columns = columns.repeat_interleave(key.shape[0] // len(columns), 0)
    return {**call.options, "position_bias": torch.cat([columns, bias.expand(len(columns), -1, -1, -1)], -1)}
