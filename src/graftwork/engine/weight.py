"""Weight port: the host's own operation with an effective weight.

The dense definition is W' = f_n(... f_1(W)), one f for each module in stacking order, and the host's own forward with
W' in place of W. Low-rank deltas at the end of the stack are run by their factors instead, the same to rounding.

    B samples, T tokens, R rank, O x I weight matrix
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from graftwork.engine import channels, factors, split
from graftwork.engine.modules import LowRankModule, WeightModule
from graftwork.engine.operations import Operation, operation_of
from graftwork.engine.seat import Graft, Seat, stored_parameter
from graftwork.errors import StateError

Running = tuple[tuple[str, tuple[Graft, ...]], ...]


def flat(running: Running) -> tuple[Graft, ...]:
    """The grafts of all running adapters in stacking order."""
    return tuple(graft for _, grafts in running for graft in grafts)


def plain(module: nn.Module, seat: Seat, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The host's forward with parameters as stored."""
    before, seat.raw = seat.raw, True
    try:
        return base.forward(module, *args, **kwargs)  # type: ignore[attr-defined]
    finally:
        seat.raw = before


def run(
    module: nn.Module, seat: Seat, base: type, running: Running, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The host's forward with the effective weight of the running adapters."""
    operation = operation_of(base)
    if seat.state.route is not None:
        args, kwargs = split.spread(seat.state.route, args, kwargs)
        if operation.thin(module, base) and all(is_thin(graft) for graft in flat(running)):
            return _thin(operation, module, seat, base, running, args, kwargs)
        return split.by_adapter_here(module, seat, base, dense_or_thin, running, args, kwargs)
    return dense_or_thin(module, seat, base, running, args, kwargs)


def dense_or_thin(
    module: nn.Module, seat: Seat, base: type, running: Running, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """One stack for the whole batch: dense modules by their effective weight, what follows by its factors."""
    operation = operation_of(base)
    grafts = flat(running)
    first_thin = len(grafts)
    if operation.thin(module, base):
        while first_thin and is_thin(grafts[first_thin - 1]):
            first_thin -= 1
    if first_thin == 0:
        return _thin(operation, module, seat, base, running, args, kwargs)
    out = _dense(operation, module, seat, base, grafts[:first_thin], args, kwargs)
    if first_thin < len(grafts):
        rest = factors.of_stack(grafts[first_thin:], module.training)
        out = operation.add(module, base, args[0] if args else next(iter(kwargs.values())), out, rest)
    return out


def _thin(
    operation: Operation,
    module: nn.Module,
    seat: Seat,
    base: type,
    running: Running,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    x = args[0] if args else next(iter(kwargs.values()))
    if seat.state.route is not None:
        groups = factors.of_route(seat, running, x, operation)
    else:
        groups = factors.of_stack(flat(running), module.training)
    fused = operation.fused(module, base, x, groups)
    if fused is not None:
        return fused
    return operation.add(module, base, x, plain(module, seat, base, args, kwargs), groups)


def _dense(
    operation: Operation,
    module: nn.Module,
    seat: Seat,
    base: type,
    grafts: tuple[Graft, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    names = {graft.site.parameter for graft in grafts} | {"bias"}
    changed = values(module, seat, grafts, names)
    if operation.packed(module):
        return operation.dense(module, args[0], changed)
    before, seat.values = seat.values, changed
    raw, seat.raw = seat.raw, True
    try:
        _refuse_shadowed(module, seat, changed)
        return base.forward(module, *args, **kwargs)  # type: ignore[attr-defined]
    finally:
        seat.values, seat.raw = before, raw


def _refuse_shadowed(module: nn.Module, seat: Seat, changed: dict[str, Tensor]) -> None:
    for name, value in changed.items():
        if getattr(module, name) is not value:
            raise StateError(
                f"{seat.path}.{name} was parametrized after attach, which hides the adapter's effective weight from "
                "the forward. Detach, parametrize, then attach again"
            )


def values(
    module: nn.Module, seat: Seat, grafts: tuple[Graft, ...], names: Iterable[str]
) -> dict[str, Tensor]:
    """Effective values of those parameters that `grafts` change, in storage layout and precision."""
    operation = operation_of(type(module))
    out: dict[str, Tensor] = {}
    for name in names:
        here = [
            g
            for g in grafts
            if (name == "bias" and changes_bias(g)) or (name == g.site.parameter and changes_weight(g))
        ]
        if not here:
            continue
        stored = stored_parameter(module, name)
        if stored is None:
            continue
        start = stored if name == "bias" else operation.matrix(module, stored)
        end = fold(start, here, bias=name == "bias")
        out[name] = end.to(stored.dtype) if name == "bias" else operation.native(end, stored)
    return out


def fold(start: Tensor, grafts: Iterable[Graft], *, bias: bool = False) -> Tensor:
    """f_n(... f_1(start)): the effective matrix, or bias, in the precision of `start`."""
    now = start
    axis = -1 if bias else channels.out_axis(start)
    for graft in grafts:
        module, own = graft.module, graft.site.channels
        change = module.effective_bias if bias else module.effective  # type: ignore[union-attr]
        if own is None:
            now = change(now, start)  # type: ignore[operator]
        else:
            part = change(channels.take(now, own, axis), channels.take(start, own, axis))  # type: ignore[operator]
            now = channels.put(now, part, own, axis)
    return now


def changes_weight(graft: Graft) -> bool:
    """Whether the module touches the matrix (a bias-only technique does not)."""
    kind: Any = type(graft.module)
    return kind.effective is not WeightModule.effective


def changes_bias(graft: Graft) -> bool:
    """Whether the module touches the bias."""
    kind: Any = type(graft.module)
    return kind.effective_bias is not WeightModule.effective_bias


def is_thin(graft: Graft) -> bool:
    """Whether the module can be run by its factors."""
    return isinstance(graft.module, LowRankModule) and not graft.site.batch and not changes_bias(graft)
