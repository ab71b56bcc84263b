"""Splitting a batch by adapter, where no batched form of a technique exists: slower, never wrong.

B samples, T tokens, C channels
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftwork.engine.blend import Blend
from graftwork.engine.operations import operation_of
from graftwork.engine.seat import Graft, Seat
from graftwork.engine.sequence_cache import is_cache
from graftwork.errors import RouteError

if TYPE_CHECKING:
    from graftwork.engine.route import Route
    from graftwork.engine.state import Routing

Running = tuple[tuple[str, tuple[Graft, ...]], ...]
Call = tuple[tuple[Any, ...], dict[str, Any]]


def signal(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation is called with: the first argument, or the first keyword's value."""
    return args[0] if args else next(iter(kwargs.values()))


def by_adapter_here(
    module: nn.Module,
    seat: Seat,
    base: type,
    run: Callable[..., Any],
    running: Running,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A site's own operation, once for each adapter on its own rows (or tokens), and once for the rest."""
    route = seat.state.route
    assert route is not None
    first = signal(args, kwargs)
    operation = operation_of(base)
    flatten = route.per_token and operation.tokens(first) is not None
    if route.per_token and any(not graft.card.token_wise for _, grafts in running for graft in grafts):
        raise RouteError(
            f"{seat.path}: {running[0][1][0].technique} mixes positions and cannot be routed per token"
        )

    def one(names: tuple[str, ...], call: Call) -> Any:
        mine = tuple((name, grafts) for name, grafts in running if name in names)
        before, seat.state.route = seat.state.route, None
        try:
            return run(module, seat, base, mine, *call) if mine else _bare(module, seat, base, *call)
        finally:
            seat.state.route = before

    if isinstance(route, Blend):
        answers = [(name, one((name,), (args, kwargs))) for name, _ in running]
        return route.mix(one((), (args, kwargs)), answers, running[0][1][0].site)
    lead = first.shape[:2] if flatten else first.shape[:1]
    return _scatter(
        one, route, operation.tokens(first), lead, tuple(name for name, _ in running), args, kwargs
    )


def spread(route: Routing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Inputs that one row stands for all samples (position ids) laid out per sample, so that rows can differ."""
    size = route.batch

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == 1 < size:
            return value.expand(size, *value.shape[1:])
        return value

    return tuple(map(wide, args)), {name: wide(value) for name, value in kwargs.items()}


def needed(seat: Seat, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a routed forward of this owner reads weights of adapters: then the batch must be split around it.

    Weights that are read on some paths only are called where a cache is used (fused kernels train and prefill).
    """
    if seat.state.route is None or not (seat.readers or seat.occasional):
        return False
    return seat.readers > 0 or not any(map(is_cache, (*args, *kwargs.values())))


def by_adapter(
    module: nn.Module,
    seat: Seat,
    base: type,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A whole module's forward, once for each adapter of the route on its own samples.

    For hosts that read a weight without calling the module: no site inside can tell the rows apart.
    """
    route = seat.state.route
    assert route is not None
    first = signal(args, kwargs) if args or kwargs else None
    if not isinstance(first, Tensor):
        raise RouteError(
            f"{seat.path} reads a weight and answers once for all rows, so it cannot be split by adapter; choose other "
            "workspaces"
        )
    if isinstance(route, Blend):
        raise RouteError(
            f"{seat.path} reads a weight that it does not call, where answers cannot be blended; route by an index, "
            "or choose workspaces that are called"
        )
    if route.per_token:
        raise RouteError(
            f"{seat.path} reads a weight that it does not call; route per sample there, not per token"
        )
    if any(map(is_cache, (*args, *kwargs.values()))):
        raise RouteError(
            f"{seat.path} reads a weight that it does not call, and its cache cannot be split by adapter; "
            "pass use_cache=False, or choose workspaces that are called"
        )

    def one(names: tuple[str, ...], call: Call) -> Any:
        state = seat.state
        before = state.snapshot()
        state.active, state.route = names, None
        try:
            return run(module, seat, base, *call)
        finally:
            state.active, state.route = before.active, before.route

    return _scatter(one, route, None, first.shape[:1], route.names, args, kwargs)


def _scatter(
    one: Callable[[tuple[str, ...], Call], Any],
    route: Route,
    tokens: int | None,
    lead: torch.Size,
    names: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    index = route.fit(lead[0], tokens).flatten()
    groups: list[tuple[tuple[str, ...], Tensor]] = []
    rest = torch.ones_like(index, dtype=torch.bool)
    for name in names:
        rows = route.rows(name, lead[0], tokens)
        if rows.numel():
            groups.append(((name,), rows))
            rest &= index != route.names.index(name)
    left = rest.nonzero().squeeze(1)
    if left.numel():
        groups.append(((), left))
    outs = [(rows, one(who, _rows_of(rows, lead, args, kwargs))) for who, rows in groups]
    return _join(outs, lead)


def _rows_of(rows: Tensor, lead: torch.Size, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    def pick(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() >= len(lead) and value.shape[: len(lead)] == lead:
            return (
                value.flatten(0, len(lead) - 1).index_select(0, rows)
                if len(lead) > 1
                else value.index_select(0, rows)
            )
        if isinstance(value, tuple):
            return tuple(pick(part) for part in value)
        return value

    return tuple(pick(value) for value in args), {name: pick(value) for name, value in kwargs.items()}


def _join(outs: list[tuple[Tensor, Any]], lead: torch.Size) -> Any:
    first = outs[0][1]
    if isinstance(first, tuple):
        return tuple(_join([(rows, out[i]) for rows, out in outs], lead) for i in range(len(first)))
    if isinstance(first, Mapping):
        raise RouteError(
            f"an answer of named parts ({', '.join(first)}) cannot be split by adapter; choose workspaces below the "
            "module that gives it"
        )
    if not isinstance(first, Tensor):
        return first
    order = torch.cat([rows for rows, _ in outs])
    joined = torch.cat([out for _, out in outs])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return joined.index_select(0, back).unflatten(0, lead) if len(lead) > 1 else joined.index_select(0, back)


def _bare(module: nn.Module, seat: Seat, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    before, seat.raw = seat.raw, True
    try:
        return base.forward(module, *args, **kwargs)  # type: ignore[attr-defined]
    finally:
        seat.raw = before
