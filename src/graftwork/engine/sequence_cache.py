"""Caches that hold slots and speak of own positions only.

Everything outside the stack (generation, masks prepared early) counts the tokens it gave; the stack counts
slots too. A cache filled with slots therefore gets a subclass of its class that takes them off, except while
the stack runs. The layout of the slots is stored on it: a cache with one means decoding, whatever is active.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graftwork.engine.sequence_layout import Layout
from graftwork.errors import PortUnavailable, StateError

_LAYOUT, _INSIDE, _GROWN = "graft_layout", "graft_inside", "graft_grown"


def is_cache(value: object) -> bool:
    """Whether an argument is a cache of keys and values, or of states."""
    return hasattr(value, "get_seq_length") or hasattr(value, "conv_states")


def layout_of(cache: Any) -> Layout | None:
    """The layout of the slots in a cache, None when it holds none."""
    return None if cache is None else getattr(own(cache), _LAYOUT, None)


def own(cache: Any) -> Any:
    """The cache of a stack's self-attention."""
    return getattr(cache, "self_attention_cache", cache)


def filled(cache: Any) -> bool:
    """Whether a cache holds anything (one look at the device where its length is a tensor)."""
    cache = own(cache)
    linear = any(_states(layer) for layer in cache.layers)
    lengths = [layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length")]
    return linear or any(int(length) > 0 for length in lengths)


def length(cache: Any) -> Any:
    """Own positions in a cache: an int, or a scalar tensor for static caches."""
    return 0 if cache is None else own(cache).get_seq_length()


def adopt(cache: Any, layout: Layout, names: str) -> None:
    """Make an empty (or just filled) cache the keeper of `layout`."""
    cache = own(cache)
    _make_room(cache, layout.length, names)
    if not hasattr(type(cache), "_graft_base"):
        cache.__class__ = prompted(type(cache))
    setattr(cache, _LAYOUT, layout)


def new(config: Any, layout: Layout) -> Any:
    """An empty dynamic cache that keeps `layout`."""
    from transformers import DynamicCache

    cache = prompted(DynamicCache)(config=config)
    setattr(cache, _LAYOUT, layout)
    return cache


def enter(cache: Any) -> bool:
    """From here on the cache counts slots too, for the stack runs. Answers what to hand to `leave`."""
    keeper = own(cache)
    if layout_of(cache) is None:
        return False
    before = getattr(keeper, _INSIDE)
    setattr(keeper, _INSIDE, True)
    return before


def leave(cache: Any, before: bool) -> None:
    """The stack has run."""
    if layout_of(cache) is not None:
        setattr(own(cache), _INSIDE, before)


_classes: dict[type, type] = {}


def prompted(base: type) -> type:
    """The subclass of a cache class that counts own positions (made once, before anything is traced)."""
    if base not in _classes:
        _classes[base] = _make(base)
    return _classes[base]


def ready() -> None:
    """Make the class of `new` now: a compiler cannot trace the making of a class."""
    from transformers import DynamicCache

    prompted(DynamicCache)


def _make(base: type) -> type:

    def get_seq_length(self: Any, layer_idx: int = 0) -> Any:
        whole = base.get_seq_length(self, layer_idx)  # type: ignore[attr-defined]
        return whole if layer_idx >= len(self.layers) else whole - _hidden(self)

    def get_mask_sizes(self: Any, query_length: int, layer_idx: int) -> tuple[int, int]:
        size, offset = base.get_mask_sizes(self, query_length, layer_idx)  # type: ignore[attr-defined]
        return (size, offset) if layer_idx >= len(self.layers) else (size - _hidden(self), offset)

    def get_max_length(self: Any, layer_idx: int | None = None) -> int:
        whole = base.get_max_length(self, layer_idx)  # type: ignore[attr-defined]
        return whole if whole < 0 else whole - _hidden(self)

    def reset(self: Any) -> None:
        base.reset(self)  # type: ignore[attr-defined]
        setattr(self, _LAYOUT, None)

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        base.reorder_cache(self, beam_idx)  # type: ignore[attr-defined]
        _select(self, beam_idx)

    def batch_select_indices(self: Any, indices: Tensor) -> None:
        base.batch_select_indices(self, indices)  # type: ignore[attr-defined]
        _select(self, indices)

    def reduce(self: Any, protocol: Any) -> Any:
        return _rebuild, (base,), self.__dict__.copy()

    body = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "_graft_base": base,
        _LAYOUT: None,
        _INSIDE: False,
        _GROWN: 0,
        "get_seq_length": get_seq_length,
        "get_mask_sizes": get_mask_sizes,
        "get_max_length": get_max_length,
        "reset": reset,
        "reorder_cache": reorder_cache,
        "batch_select_indices": batch_select_indices,
    }
    return type(base)(base.__name__, (base,), body)


def _rebuild(base: type) -> Any:
    kind: Any = prompted(base)
    return kind.__new__(kind)


def _hidden(cache: Any) -> int:
    layout = getattr(cache, _LAYOUT)
    return 0 if layout is None or getattr(cache, _INSIDE) else layout.length


def _select(cache: Any, rows: Tensor) -> None:
    layout = getattr(cache, _LAYOUT)
    if layout is not None:
        setattr(cache, _LAYOUT, layout.select(rows))


def _states(layer: Any) -> bool:
    """Whether a linear-attention layer has seen anything."""
    return any(getattr(layer, "has_previous_state", {}).values())


def _make_room(cache: Any, slots: int, names: str) -> None:
    """Static layers get the slots on top of the length that was asked for."""
    static = [layer for layer in cache.layers if hasattr(layer, "max_cache_len")]
    if any(getattr(layer, "is_sliding", False) for layer in static):
        raise PortUnavailable(
            f"prompt {names} with a static sliding-window cache: its window is its size, so there is no room "
            "for slots; use the dynamic cache"
        )
    more = slots - getattr(cache, _GROWN, 0)
    if not static or more <= 0:
        return
    if any(layer.is_initialized for layer in static):
        raise StateError(
            f"prompt {names} needs {more} more positions than this static cache was made with; make it anew"
        )
    for layer in static:
        layer.max_cache_len += more
    setattr(cache, _GROWN, slots)
