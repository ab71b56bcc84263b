"""Class swap: a host module's class is replaced by a subclass of it that serves its seat.

One class per base class, with the base's name, qualname and module; `forward` stands in the class body, so
that transformers' checkpointing wrapper stays the outermost. Everything is decided by the module's own seat,
so one class serves sites, owners, checkpointed layers, attention modules, stacks and roots alike.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.engine import attention, calls, export, fastpath, recompute
from graftwork.engine.seat import GRAFTS, SEAT, Seat, seat_of
from graftwork.engine.state import State, note_forward
from graftwork.errors import StateError

_classes: dict[tuple[type, tuple[str, ...]], type] = {}


def take_seat(module: nn.Module, state: State, path: str) -> Seat:
    """Seat graftwork on a module (once); swaps its class."""
    seat = seat_of(module)
    if seat is not None:
        if seat.state is not state:
            raise StateError(
                f"{path or 'the model'} belongs to another attached model; detach there first, "
                "or attach to the model that contains both"
            )
        return seat
    _refuse_foreign_forward(module, path)
    if GRAFTS in module._modules:
        raise StateError(
            f"{path}: has a child named {GRAFTS!r} of its own, the name under which adapter tensors live"
        )
    base = type(module)
    seat = Seat(state, path)
    module.__dict__[SEAT] = seat
    module.__class__ = swapped(base, _readable(module))
    _rebind(module, base, type(module))
    state.seated = state.seated | {path}
    return seat


def leave_seat(module: nn.Module, path: str) -> None:
    """Undo `take_seat`: class back, our entries gone."""
    seat = seat_of(module)
    if seat is None:
        return
    swapped_class = type(module)
    base = base_of(swapped_class)
    _rebind(module, swapped_class, base)
    module.__class__ = base
    del module.__dict__[SEAT]
    seat.state.seated = seat.state.seated - {path}


def check_leavable(module: nn.Module, path: str) -> None:
    """Refuse to take the class back when somebody subclassed after us; setting it would drop their layer."""
    if not is_ours(type(module)):
        raise StateError(
            f"{path}: its class is now {type(module).__mro__[0].__qualname__} on top of graftwork's "
            "(parametrize, fully_shard or another library came after attach). Undo that first, then detach"
        )


def is_ours(kind: type) -> bool:
    """Whether a class is itself a swapped one, not a subclass that somebody made of it."""
    return "_graft_base" in kind.__dict__


def base_of(kind: type) -> type:
    """The class a module had before the swap."""
    for entry in kind.__mro__:
        found = entry.__dict__.get("_graft_base")
        if found is not None:
            return found
    return kind


def swapped(base: type, readable: tuple[str, ...]) -> type:
    """The subclass of `base` that serves a seat, with effective properties for the parameters `readable`."""
    key = (base, readable)
    if key not in _classes:
        _classes[key] = _make(base, readable)
    return _classes[key]


def _make(base: Any, readable: tuple[str, ...]) -> type:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seat = getattr(self, SEAT, None)
        if seat is None:  # a bound forward that outlived detach
            return base.forward(self, *args, **kwargs)
        return calls.forward(self, seat, base, args, kwargs)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seat = getattr(self, SEAT, None)
        if seat is None:
            return base.__call__(self, *args, **kwargs)
        if seat.state.threaded:
            return _in_turn(self, seat, base, args, kwargs)
        if torch.compiler.is_compiling():
            return _raw_call(self, seat, base, args, kwargs)
        with seat.state.lock:
            note_forward(seat.state)
            return _raw_call(self, seat, base, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        if not is_ours(type(self)):  # somebody subclassed after us; their class says how
            return object.__reduce_ex__(self, protocol)
        return _rebuild, (base, readable), self.__dict__.copy()

    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_graft_base": base,
        "forward": forward,
        "__call__": call,
        "__reduce_ex__": reduce,
    }
    body.update({name: _parameter(base, name) for name in readable})
    body.update(recompute.members(base))
    body.update(attention.members(base))
    body.update(export.members(base))
    body.update(fastpath.members(base))
    return type(base)(base.__name__, (base,), body)


def _raw_call(module: nn.Module, seat: Seat, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The base's call, hooks included, with the module's own parameters read as stored."""
    before, seat.raw = seat.raw, True
    try:
        return base.__call__(module, *args, **kwargs)
    finally:
        seat.raw = before


@torch.compiler.disable(
    reason="graftwork: several threads choose adapters of one model; use one lock, not threads"
)
def _in_turn(module: nn.Module, seat: Seat, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with seat.state.turn():
        return _raw_call(module, seat, base, args, kwargs)


def _rebuild(base: Any, readable: tuple[str, ...]) -> nn.Module:
    kind: Any = swapped(base, readable)
    return kind.__new__(kind)


def _readable(module: nn.Module) -> tuple[str, ...]:
    """Names that can be read in effective form: floating point, not packed, wherever the module keeps them
    (its parameters; plain tensors, as weight_norm and prune leave them; torch's parametrizations)."""
    kept: dict[str, Any] = {**module._parameters, **module.__dict__}
    plain = [name for name, value in kept.items() if name in module._parameters or isinstance(value, Tensor)]
    floating = [name for name in plain if kept[name] is None or kept[name].is_floating_point()]
    return (*floating, *getattr(module, "parametrizations", ()))


def _parameter(base: type, name: str) -> property:
    """A property that answers with the effective value while an owner runs, else with the stored one."""

    below = getattr(
        base, name, None
    )  # torch's parametrizations are properties of a class made for the module

    def stored(self: nn.Module) -> Tensor | None:
        if name in self._parameters:
            return self._parameters[name]
        if name in self.__dict__:
            return self.__dict__[name]
        if isinstance(below, property) and below.fget is not None:
            return below.fget(self)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def get(self: nn.Module) -> Tensor | None:
        value = stored(self)
        seat = self.__dict__.get(SEAT)
        if seat is None:
            return value
        try:
            return calls.read(self, seat, name, value)
        except (
            AttributeError
        ) as error:  # torch would take it for a missing attribute and answer with the stored one
            raise StateError(f"{seat.path}: computing the effective {name} failed: {error}") from error

    def put(self: nn.Module, value: Any) -> None:
        if isinstance(below, property) and below.fset is not None:
            below.fset(self, value)
        else:
            self.__dict__[name] = value

    def delete(self: nn.Module) -> None:
        del self.__dict__[name]

    return property(get, put, delete)


def _rebind(module: nn.Module, old: Any, new: Any) -> None:
    """Hooks of accelerate keep a bound forward on the instance; point it at the class that serves now."""
    for name in ("_old_forward", "forward"):
        bound = module.__dict__.get(name)
        if isinstance(bound, types.MethodType) and bound.__func__ is old.forward:
            module.__dict__[name] = types.MethodType(new.forward, module)
    if module.__dict__.get("forward") is not None and "_old_forward" not in module.__dict__:
        bound = module.__dict__["forward"]
        if isinstance(bound, types.MethodType) and bound.__func__ is new.forward and bound.__self__ is module:
            del module.__dict__["forward"]


def _refuse_foreign_forward(module: nn.Module, path: str) -> None:
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
        raise StateError(
            f"{path}: a forward is set on the instance and would hide the adapter. Attach first and patch "
            "then, or remove the patch"
        )


def no_inference(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run with inference mode off: parameters made inside it could never be trained."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(mode=False):
            return function(*args, **kwargs)

    return run


__all__ = [
    "GRAFTS",
    "base_of",
    "check_leavable",
    "is_ours",
    "leave_seat",
    "no_inference",
    "swapped",
    "take_seat",
]
