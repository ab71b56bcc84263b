"""Attention port: extra keys and values, through transformers' attention interface.

The config is never written. While an attention module with a running prefix runs its forward, its `config`
reads as a view whose implementation name is ours; the backbone and the code that makes masks read the true
name. Our function puts the prefix in front of the keys and hands on to the implementation of that true name.

    B samples, H key heads, Q query positions, K key positions, N prefix positions, D head width
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from graftwork.engine import prefix, widen
from graftwork.engine.seat import SEAT, Seat, seat_of
from graftwork.engine.widen import Call
from graftwork.errors import PortUnavailable
from graftwork.reference.properties import Port
from graftwork.reference.site import Site

_NAME = "graftwork"
_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "_graft_eager"
_FUNCTIONS = "_graft_functions"


class _View:
    """A config as the attention module reads it: the implementation is ours, all else the config's."""

    _attn_implementation = _NAME

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def members(base: type) -> dict[str, Any]:
    """Class members of an attention module's swapped class; empty for any other."""
    function = _interface_user(base)
    if function is None:
        return {}
    registry = function.__globals__[_REGISTRY]
    type(registry).register(_NAME, attend)
    return {
        "config": property(_config, _set_config),
        _EAGER: staticmethod(_eager(function)),
        _FUNCTIONS: registry,
    }


def check(module: nn.Module, site: Site) -> None:
    """Refuse a module that cannot host a prefix, with the reason."""
    where = f"attention port: {site.key} ({site.module}, {type(module).__name__})"
    if _interface_user(type(module)) is None:
        raise PortUnavailable(
            f"{where} does not go through transformers' attention interface. "
            "Use the sequence port (prompt tuning)"
        )
    _refuse_reordered(module, where)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered under our name.

    Args:
        query: (B, heads, Q, D). key, value: (B, H, K, D).
        attention_mask: whatever the true implementation reads.

    Returns:
        (output, weights or None), without the prefix's columns: the rows of weights sum to less than one.
    """
    seat = seat_of(module)
    assert seat is not None
    depth, seat.depth = seat.depth, 0  # the true implementation may read module.config: it gets the true one
    try:
        return _attend(module, seat, Call(query, key, value, attention_mask, options))
    finally:
        seat.depth = depth


def _attend(module: nn.Module, seat: Seat, call: Call) -> tuple[Tensor, Tensor | None]:
    seat.touch(Port.ATTENTION)
    name = str(module.config._attn_implementation)  # type: ignore[union-attr]
    original = getattr(module, _FUNCTIONS).get_interface(name, getattr(module, _EAGER))
    extra = prefix.gather(seat, call.key, call.value)
    if extra is not None:
        _refuse_reordered(module, f"attention port: {seat.path}")
        call = widen.prepend(module, seat.path, name, extra, call)
    out, weights = original(module, call.query, call.key, call.value, call.mask, **call.options)
    return out, weights if weights is None or extra is None else weights[..., extra.length :]


def _config(module: nn.Module) -> Any:
    if "config" not in module.__dict__:
        raise AttributeError("config")
    stored = module.__dict__["config"]
    seat = module.__dict__.get(SEAT)
    if seat is None or not seat.depth or not seat.running(Port.ATTENTION):
        return stored
    return _View(stored)


def _set_config(module: nn.Module, value: Any) -> None:
    module.__dict__["config"] = value


def _interface_user(kind: type) -> Callable[..., Any] | None:
    """The unwrapped forward of a class that calls transformers' attention interface, else None."""
    function = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    code = getattr(function, "__code__", None)
    return function if code is not None and _REGISTRY in code.co_names else None


def _eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """The eager function, which a forward hands to the registry as its default: it is not in there."""
    found = [name for name in function.__code__.co_names if "eager" in name and name in function.__globals__]
    return function.__globals__[found[0]] if found else _no_eager


def _no_eager(module: nn.Module, *args: Any, **options: Any) -> Any:
    raise PortUnavailable(
        f"attention port: {type(module).__name__} has no eager attention that could take a prefix; "
        "choose another one: model.set_attn_implementation('sdpa')"
    )


def _refuse_reordered(module: nn.Module, where: str) -> None:
    """GPT-2 computes this option in its forward, when it reads "eager", and not through the interface."""
    config = getattr(module, "config", None)
    if (
        getattr(module, "reorder_and_upcast_attn", False)
        and getattr(config, "_attn_implementation", "") == "eager"
    ):
        raise PortUnavailable(
            f"{where}: reorder_and_upcast_attn with eager attention does not go through the interface. "
            "Set reorder_and_upcast_attn=False, or model.set_attn_implementation('sdpa')"
        )
