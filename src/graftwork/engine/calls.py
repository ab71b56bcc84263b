"""What happens when a seated module is called, or when its parameters are read.

A call runs, from outside in: the root's checks, the sequence port, the split of a routed batch where the host only
reads weights, hidden modules on the input, the host's operation with its effective weight, hidden modules on the
output. Nothing of ours running means a plain call of the base's forward.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.engine import checks, hidden, split, weight
from graftwork.engine.lean import Unfit
from graftwork.engine.seat import Seat
from graftwork.errors import RouteError, StateError
from graftwork.reference.properties import Port
from graftwork.reference.site import Access


def forward(module: nn.Module, seat: Seat, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The swapped class's forward."""
    if seat.root and seat.state.assigned:
        seat.state.assigned = ()
    if seat.root and seat.state.chosen is not None:
        return _by_router(module, seat, base, args, kwargs)
    if seat.root:
        return checks.root_call(module, seat, _arranged, base, args, kwargs)
    return _arranged(module, seat, base, args, kwargs)


def _by_router(
    module: nn.Module, seat: Seat, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The model's forward with the route that its router decides for this call."""
    state, chosen = seat.state, seat.state.chosen
    assert chosen is not None
    state.route, state.chosen = chosen.of_call(module, state, base, args, kwargs), None
    state.changes += 1
    state.ran_at = state.changes
    try:
        return checks.root_call(module, seat, _arranged, base, args, kwargs)
    finally:
        state.route, state.chosen = None, chosen
        state.changes += 1  # nobody may recompute a part of this forward without its route


def _arranged(
    module: nn.Module, seat: Seat, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if seat.around is not None:
        return seat.around(module, seat, base, own, args, kwargs)
    return own(module, seat, base, args, kwargs)


def own(module: nn.Module, seat: Seat, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's forward with its children's parameters readable in effective form."""
    if (seat.readers or seat.occasional) and split.needed(seat, args, kwargs):
        return split.by_adapter(module, seat, base, own, args, kwargs)
    if seat.lean is not None and (out := _lean(module, seat, base, args, kwargs)) is not NotImplemented:
        return out
    seat.depth += 1
    try:
        if not seat.ports and not seat.keeps_input:
            return base.forward(module, *args, **kwargs)  # type: ignore[attr-defined]
        return _site(module, seat, base, args, kwargs)
    finally:
        seat.depth -= 1


def _lean(module: nn.Module, seat: Seat, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The lean form of a call, NotImplemented where the host's own forward must run."""
    assert seat.lean is not None
    try:
        return seat.lean(module, seat, base, args, kwargs)
    except Unfit as reason:
        if str(reason) and not torch.compiler.is_compiling():
            warnings.warn(f"lean host: {seat.path or 'the loss'} runs as usual: {reason}", stacklevel=2)
        return NotImplemented


def _site(module: nn.Module, seat: Seat, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weights, around = seat.running(Port.WEIGHT), seat.running(Port.HIDDEN)
    if seat.keeps_input:
        seat.kept = hidden.signal(args, kwargs, seat.path)
    if not weights and not around:
        return weight.plain(module, seat, base, args, kwargs)
    if around:
        seat.touch(Port.HIDDEN)
        args, kwargs = hidden.before(seat, around, args, kwargs)
    entered = args, kwargs
    if weights:
        seat.touch(Port.WEIGHT)
        out = weight.run(module, seat, base, weights, args, kwargs)
    else:
        out = weight.plain(module, seat, base, args, kwargs)
    if around:
        out = hidden.behind(seat, around, entered, out)
    for entry in seat.entries.values():
        entry.kept = None
    return out


def read(module: nn.Module, seat: Seat, name: str, stored: Tensor | None) -> Tensor | None:
    """A parameter as code that reads it should see it."""
    if seat.values is not None and name in seat.values:
        return seat.values[name]
    if seat.raw or stored is None or stored.is_meta or not any(owner.depth for owner in seat.owners):
        return stored
    weights, around = seat.running(Port.WEIGHT), seat.running(Port.HIDDEN)
    if not weights and not around:
        return stored
    access = (weights or around)[0][1][0].site.access
    routed = seat.state.route is not None
    if access is Access.INSPECTED or (routed and access is Access.CALLED):
        return stored
    if routed:
        raise RouteError(
            f"{seat.path}.{name} is read while a route is set, where no batch can be split. "
            "Route whole batches (gw.active), or choose another workspace"
        )
    seat.touch(Port.WEIGHT)
    if around and access is Access.EITHER:
        raise StateError(
            f"{seat.path}.{name} is read by its owner instead of calling the module (a fused kernel), which would "
            f"skip {around[0][1][0].technique}; switch the fused path off, or use a weight-port technique there"
        )
    return weight.values(module, seat, weight.flat(weights), (name,)).get(name, stored)
