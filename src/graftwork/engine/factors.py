"""The factors of running low-rank modules, gathered so that any number of adapters costs two thin products.

Stacked adapters: their factors side by side. Routed adapters: the same, and a mask over the inner coordinates lets
each sample or token through those of its own adapter.

    B samples, T tokens, I, O channels, R the sum of ranks
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwork.engine import channels
from graftwork.engine.modules import LowRankModule
from graftwork.engine.route import Route
from graftwork.engine.seat import Graft, Seat

if TYPE_CHECKING:
    from graftwork.engine.operations import Operation


@dataclass(frozen=True)
class Factors:
    """scale * ((drop(x) downᵀ) * mask) upᵀ, with down (R, I), up (O, R), mask (B, 1 or T, R) or None."""

    down: Tensor
    up: Tensor
    scale: float
    dropout: float = 0.0
    mask: Tensor | None = None


def of_stack(grafts: tuple[Graft, ...], training: bool) -> tuple[Factors, ...]:
    """Groups to run one after another: one for all adapters, or one each where dropout must differ."""
    if len(grafts) == 1 and grafts[0].site.channels is None:
        return (_one(grafts[0], training),)
    groups = [_one(graft, training) for graft in grafts]
    if any(group.dropout for group in groups):
        return tuple(groups)
    return (_side_by_side(groups),)


def of_route(
    seat: Seat, running: tuple[tuple[str, tuple[Graft, ...]], ...], x: Tensor, operation: Operation
) -> tuple[Factors, ...]:
    """One group for all adapters of the route, masked per sample or token; with dropout, one group each."""
    route = seat.state.route
    assert route is not None
    index = laid_out(route, x, operation)
    grafts = [(route.names.index(name), graft) for name, grafts in running for graft in grafts]
    training = grafts[0][1].module.training
    groups = [(number, _one(graft, training)) for number, graft in grafts]
    if any(group.dropout for _, group in groups):
        return tuple(
            Factors(g.down, g.up, g.scale, g.dropout, (index == n).expand(*index.shape[:-1], g.down.shape[0]))
            for n, g in groups
        )
    owner = torch.tensor([n for n, g in groups for _ in range(g.down.shape[0])], device=x.device)
    joined = _cached(seat, groups) if not torch.is_grad_enabled() else _side_by_side([g for _, g in groups])
    return (Factors(joined.down, joined.up, joined.scale, 0.0, index == owner),)


def laid_out(route: Route, x: Tensor, operation: Operation) -> Tensor:
    """The route's index with trailing axes of one, so that it broadcasts against the operation's answer."""
    tokens = operation.tokens(x)
    index = route.fit(x.shape[0], tokens)
    return index.view(*index.shape, *(1,) * (operation.answer_dims(x) - index.dim()))


def _one(graft: Graft, training: bool) -> Factors:
    module = graft.module
    assert isinstance(module, LowRankModule)
    down, up = module.factors()
    total = graft.site.fused_width or graft.site.width_out
    dropout = module.dropout if training else 0.0
    return Factors(down, channels.widen(up, graft.site.channels, total), module.scale, dropout)


def _side_by_side(groups: list[Factors]) -> Factors:
    down = torch.cat([group.down for group in groups])
    up = torch.cat([group.up * group.scale for group in groups], dim=1)
    return Factors(down, up, 1.0)


def _cached(seat: Seat, groups: list[tuple[int, Factors]]) -> Factors:
    """The joined factors, kept while no tensor changes (nothing trains: gradients are off)."""
    if torch.compiler.is_compiling():
        return _side_by_side([group for _, group in groups])
    key: tuple[Any, ...] = tuple(
        (g.down.data_ptr(), g.down._version, g.up.data_ptr(), g.up._version) for _, g in groups
    )
    found = seat.stacked.get("route")
    if found is None or found[0] != key:
        found = (key, _side_by_side([group for _, group in groups]))
        seat.stacked = {"route": found}
    return found[1]
