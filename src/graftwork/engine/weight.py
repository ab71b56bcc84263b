"""Weight port: the host's own operation with an effective weight.

The dense definition is W' = f_n(... f_1(W)), one f for each module in stacking order, and the host's own forward with
W' in place of W. Low-rank deltas at the end of the stack are run by their factors instead, the same to rounding.

    B samples, T tokens, R rank, O x I weight matrix
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.engine import channels, factors, split
from graftwork.engine.below import Below
from graftwork.engine.factors import Factors
from graftwork.engine.lowrank import compute_dtype, thin_dtype
from graftwork.engine.modules import DeltaModule, LowRankModule, WeightModule
from graftwork.engine.operations import Operation, operation_of
from graftwork.engine.routed import low_rank_routed
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
    route = seat.state.route
    if route is None:
        return dense_or_thin(module, seat, base, running, args, kwargs)
    operation = operation_of(base)
    args, kwargs = split.spread(route, args, kwargs)
    out = _routed(operation, module, seat, base, running, split.signal(args, kwargs))
    if out is not None:
        return out
    if operation.thin(module, base) and all(is_thin(graft) for graft in flat(running)):
        x = split.signal(args, kwargs)
        groups = factors.of_route(seat, running, x, operation)
        return _with_groups(operation, module, seat, base, groups, args, kwargs)
    return split.by_adapter_here(module, seat, base, dense_or_thin, running, args, kwargs)


def dense_or_thin(
    module: nn.Module, seat: Seat, base: type, running: Running, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """One stack for the whole batch: up to the last module that needs a dense weight by the effective weight, what
    follows by its factors or by its own answer."""
    operation = operation_of(base)
    grafts = flat(running)
    fast = len(grafts)
    while fast and _runs_without_weight(operation, module, base, grafts[fast - 1]):
        fast -= 1
    dense, above = grafts[:fast], grafts[fast:]
    if not all(_by_factors(operation, module, base, graft) for graft in above):
        return _answer(operation, module, seat, base, dense, above, split.signal(args, kwargs))
    groups = factors.of_stack(above, module.training) if above else ()
    if not dense:
        return _with_groups(operation, module, seat, base, groups, args, kwargs)
    out = _dense(operation, module, seat, base, dense, args, kwargs)
    return operation.add(module, base, split.signal(args, kwargs), out, groups) if groups else out


def _runs_without_weight(operation: Operation, module: nn.Module, base: type, graft: Graft) -> bool:
    if is_thin(graft):
        return operation.thin(module, base)
    return answers(graft) and operation.linear(module, base)


def _by_factors(operation: Operation, module: nn.Module, base: type, graft: Graft) -> bool:
    """Whether the module is run by its factors: it has some, and no cheaper answer of its own."""
    return is_thin(graft) and not (answers(graft) and operation.linear(module, base))


def _with_groups(
    operation: Operation,
    module: nn.Module,
    seat: Seat,
    base: type,
    groups: tuple[Factors, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The host's forward plus low-rank deltas, in one function where that is possible."""
    x = split.signal(args, kwargs)
    fused = operation.fused(module, base, x, groups)
    if fused is not None:
        return fused
    return operation.add(module, base, x, plain(module, seat, base, args, kwargs), groups)


def _answer(
    operation: Operation,
    module: nn.Module,
    seat: Seat,
    base: type,
    dense: tuple[Graft, ...],
    above: tuple[Graft, ...],
    x: Tensor,
) -> Tensor:
    """Modules one on another, each asked with what lies beneath it."""

    def host(signal: Tensor) -> Tensor:
        if dense:
            return _dense(operation, module, seat, base, dense, (signal,), {})  # type: ignore[no-any-return]
        return plain(module, seat, base, (signal,), {})  # type: ignore[no-any-return]

    def with_low_rank(signal: Tensor, groups: tuple[Factors, ...]) -> Tensor:
        if dense:
            return operation.add(module, base, signal, host(signal), groups)
        return _with_groups(operation, module, seat, base, groups, (signal,), {})  # type: ignore[no-any-return]

    def matrix_under(count: int) -> Callable[[], Tensor]:
        def read() -> Tensor:
            stored = stored_parameter(module, "weight")
            assert stored is not None
            start = operation.matrix(module, stored)
            return fold(start, [g for g in (*dense, *above[:count]) if changes_weight(g)])

        return read

    bias = values(module, seat, dense, ("bias",)).get("bias", module._parameters.get("bias"))
    bare = not dense and base.forward is nn.Linear.forward  # type: ignore[attr-defined]
    below = Below(host, with_low_rank, matrix_under(0), bias, bare)
    *under, last = above
    for number, graft in enumerate(under, start=1):
        below = _over(operation, module, base, graft, below, matrix_under(number))
    return one_answer(last, x, below, module.training)


def _over(
    operation: Operation,
    module: nn.Module,
    base: type,
    graft: Graft,
    below: Below,
    matrix: Callable[[], Tensor],
) -> Below:
    """The operation with one more module of the stack."""
    training = module.training

    def product(signal: Tensor) -> Tensor:
        return one_answer(graft, signal, below, training)

    def with_low_rank(signal: Tensor, groups: tuple[Factors, ...]) -> Tensor:
        return operation.add(module, base, signal, product(signal), groups)

    return Below(product, with_low_rank, matrix, below.bias, False)


def one_answer(graft: Graft, x: Tensor, below: Below, training: bool) -> Tensor:
    """What one module makes of what lies beneath it."""
    if is_thin(graft) and not answers(graft):
        return below.with_low_rank(x, factors.of_stack((graft,), training))
    own: Any = graft.module
    if graft.site.channels is not None:  # a part of a fused projection: the other channels stay
        whole = below(x)
        delta = own.added(x).to(whole.dtype)
        mine = channels.take(whole, graft.site.channels, -1)
        return channels.put(whole, mine + delta, graft.site.channels, -1)
    if type(own).answer is not WeightModule.answer:
        return own.answer(x, below)  # type: ignore[no-any-return]
    return below.plus(x, own.added(x))


def _routed(
    operation: Operation, module: nn.Module, seat: Seat, base: type, running: Running, x: Tensor
) -> Tensor | None:
    """A routed linear layer by the cheapest of its forms, with the stack of the call before while that stands; None
    where the batch has to be masked or split."""
    weight, route = operation.direct(module, base), seat.state.route
    assert route is not None
    if weight is None:
        return None
    rows = route.layout(x.shape[0], operation.tokens(x))
    if rows is None or rows.index.shape != x.shape[: rows.index.dim()]:
        return None
    dtype, kept = thin_dtype(x, compute_dtype(x)), seat.kept_stack
    bias = module._parameters.get("bias")
    records = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if not records and kept is not None and kept.stands(seat, route.names, dtype, module.training):
        return low_rank_routed(x, weight, bias, kept.stack, rows, dropout=kept.dropout)
    if not all(is_thin(graft) for graft in flat(running)):
        return None
    found = factors.stack_of_route(seat, running, dtype)
    if found is None:
        return None
    stack, dropout = found
    return low_rank_routed(x, weight, bias, stack, rows, dropout=dropout)


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
        own = [g for g in grafts if name == g.site.parameter and changes_weight(g)]
        beside = name == "bias" and not own  # the bias of a weight, and no bare parameter of that name
        here = [g for g in grafts if changes_bias(g)] if beside else own
        if not here:
            continue
        stored = stored_parameter(module, name)
        if stored is None:
            continue
        start = stored if beside else operation.matrix(module, stored)
        end = fold(start, here, bias=beside)
        out[name] = end.to(stored.dtype) if beside else operation.native(end, stored)
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


def answers(graft: Graft) -> bool:
    """Whether the module can answer for a linear layer without a dense weight."""
    kind: Any = type(graft.module)
    if not issubclass(kind, WeightModule) or graft.site.batch or changes_bias(graft):
        return False
    adds = issubclass(kind, DeltaModule) and kind.added is not DeltaModule.added
    return adds or (kind.answer is not WeightModule.answer and graft.site.channels is None)


def is_thin(graft: Graft) -> bool:
    """Whether the module can be run by its factors."""
    return isinstance(graft.module, LowRankModule) and not graft.site.batch and not changes_bias(graft)
