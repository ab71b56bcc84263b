"""Keys of a prefix that were trained behind rotary positions, turned so that tokens may stay where they are.

N prefix positions, W = heads x head width
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.errors import PortUnavailable


def rotate_keys_back(keys: Tensor, n: int, model: nn.Module, path: str) -> Tensor:
    """K' = R(-n) K: what a prefix says to tokens at 0, 1, ... when its keys K spoke to tokens at n, n + 1...

    Exact for rotary positions alone, where scores depend on differences only. A learned table knows no such
    trick: there `shift_positions` moves the tokens.

    Args:
        keys: (N, W), as they stand in a cache.
        n: how far the tokens were moved, the prefix's length.
        model: the host.
        path: dotted name of the attention module.

    Raises:
        PortUnavailable: the attention has no rotary positions.
    """
    attention, rotary = model.get_submodule(path), _rotary(model, path)
    turn = inspect.unwrap(type(attention).forward).__globals__.get("apply_rotary_pos_emb")  # type: ignore[attr-defined]
    if rotary is None or turn is None:
        raise PortUnavailable(f"{path} has no rotary positions that keys could be turned back by")
    cos, sin = _angle(rotary, attention, keys, n)
    whole = keys.unflatten(-1, (-1, _head_width(attention, keys))).transpose(0, 1)[None].double()
    turned: Tensor = turn(whole, whole, cos, -sin)[1]
    return turned[0].transpose(0, 1).flatten(1).to(keys.dtype)


def _rotary(model: nn.Module, path: str) -> Any:
    """The nearest module above (or in) an attention module that makes its angles."""
    parts = path.split(".")
    for depth in range(len(parts), -1, -1):
        found = getattr(model.get_submodule(".".join(parts[:depth])), "rotary_emb", None)
        if found is not None:
            return found
    return None


def _angle(rotary: Callable[..., Any], attention: nn.Module, keys: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1, N, D) of n positions, of radius one: some schedules scale them for attention."""
    kinds = getattr(getattr(attention, "config", None), "layer_types", None)
    per_kind = "layer_type" in inspect.signature(getattr(rotary, "forward", rotary)).parameters
    options = {"layer_type": kinds[attention.layer_idx]} if per_kind and kinds else {}  # type: ignore[index]
    places = torch.full((1, len(keys)), n, device=keys.device)
    cos, sin = rotary(keys.float()[None], position_ids=places, **options)
    radius = (cos.double() ** 2 + sin.double() ** 2).sqrt()
    return cos.double() / radius, sin.double() / radius


def _head_width(attention: nn.Module, keys: Tensor) -> int:
    for name in ("head_dim", "head_size"):
        found = getattr(attention, name, None)
        if isinstance(found, int):
            return found
    raise PortUnavailable(f"{type(attention).__name__} does not say how wide its heads are")
