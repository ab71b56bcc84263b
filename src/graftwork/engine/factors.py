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
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from graftwork.engine import channels
from graftwork.engine.modules import LowRankModule
from graftwork.engine.routed import Stack
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
    groups = [group for graft in grafts for group in _of(graft, training)]
    if len(groups) == 1 or any(group.dropout for group in groups):
        return tuple(groups)
    return (_side_by_side(groups),)


def of_route(
    seat: Seat, running: tuple[tuple[str, tuple[Graft, ...]], ...], x: Tensor, operation: Operation
) -> tuple[Factors, ...]:
    """One group for all adapters of the route or blend, masked or weighted per sample or token; with dropout, one
    group each."""
    route = seat.state.route
    assert route is not None
    grafts = [(route.names.index(name), graft) for name, grafts in running for graft in grafts]
    training, layer = grafts[0][1].module.training, grafts[0][1].site.layer
    groups = [(number, group) for number, graft in grafts for group in _of(graft, training)]
    tokens, dims = operation.tokens(x), operation.answer_dims(x)

    def mask(numbers: list[int]) -> Tensor:
        owners = torch.tensor(numbers, device=x.device)
        return route.coordinates(owners, x.shape[0], tokens, dims, layer)

    if any(group.dropout for _, group in groups):
        return tuple(
            Factors(g.down, g.up, g.scale, g.dropout, mask([n] * g.down.shape[0])) for n, g in groups
        )
    joined = _side_by_side([group for _, group in groups])
    owners = [n for n, g in groups for _ in range(g.down.shape[0])]
    return (Factors(joined.down, joined.up, joined.scale, 0.0, mask(owners)),)


def stack_of_route(
    seat: Seat, running: tuple[tuple[str, tuple[Graft, ...]], ...], dtype: torch.dtype
) -> tuple[Stack, float] | None:
    """The factors of all adapters of the route, one padded pair each, and their common dropout; None without one.

    Without gradients the stack is kept, in that precision, while no tensor of it changes.
    """
    route = seat.state.route
    assert route is not None
    training = running[0][1][0].module.training
    groups = {name: [group for graft in grafts for group in _of(graft, training)] for name, grafts in running}
    rates = {group.dropout for here in groups.values() for group in here}
    if len(rates) != 1:
        return None
    dropout = rates.pop()
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _stacked(groups, route.names, None), dropout
    stack = _stacked(groups, route.names, dtype)
    seat.kept_stack = Kept(
        route.names, dtype, training, seat.ports, _entries(running), _steps.taken, stack, dropout
    )
    return stack, dropout


class _Steps:
    """How many steps optimisers have taken: fused ones change tensors without raising their versions."""

    def __init__(self) -> None:
        self.taken = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self.taken += 1


_steps = _Steps()


@dataclass(frozen=True)
class Kept:
    """A stack of factors and what it was made of; it stands while none of that changes.

    Attributes:
        ports: the grafts of the seat (replaced, never mutated).
        entries: (dictionary of a module, name, tensor, its memory, its version) of each tensor read.
        steps: of any optimiser, when it was made.
    """

    names: tuple[str, ...]
    dtype: torch.dtype
    training: bool
    ports: object
    entries: tuple[tuple[dict[str, Tensor | None], str, Tensor, int, int], ...]
    steps: int
    stack: Stack
    dropout: float

    def stands(self, seat: Seat, names: tuple[str, ...], dtype: torch.dtype, training: bool) -> bool:
        """Whether it is still what the seat's modules amount to."""
        same = self.names == names and self.dtype is dtype and self.training is training
        return (
            same
            and self.steps == _steps.taken
            and self.ports is seat.ports
            and all(
                held.get(name) is tensor and tensor._version == version and tensor.data_ptr() == memory
                for held, name, tensor, memory, version in self.entries
            )
        )


def _entries(
    running: tuple[tuple[str, tuple[Graft, ...]], ...],
) -> tuple[tuple[dict[str, Tensor | None], str, Tensor, int, int], ...]:
    tables: list[dict[str, Any]] = [
        table
        for _, grafts in running
        for graft in grafts
        for module in graft.module.modules()
        for table in (module._parameters, module._buffers)
    ]
    return tuple(
        (table, name, tensor, tensor.data_ptr(), tensor._version)
        for table in tables
        for name, tensor in table.items()
        if tensor is not None
    )


def _stacked(groups: dict[str, list[Factors]], names: tuple[str, ...], dtype: torch.dtype | None) -> Stack:
    joined = {name: here[0] if len(here) == 1 else _side_by_side(here) for name, here in groups.items()}
    return Stack.of([_triple(joined.get(name)) for name in names], dtype)


def _triple(group: Factors | None) -> tuple[Tensor, Tensor, float] | None:
    return None if group is None else (group.down, group.up, group.scale)


def _of(graft: Graft, training: bool) -> list[Factors]:
    """A module's own factors, and what its initialiser took out of the weight (never dropped)."""
    module = graft.module
    assert isinstance(module, LowRankModule)
    down, up = module.factors()
    total = graft.site.fused_width or graft.site.width_out
    dropout = module.dropout if training else 0.0
    own = Factors(down, channels.widen(up, graft.site.channels, total), module.scale, dropout)
    taken = module.taken()
    if taken is None:
        return [own]
    return [own, Factors(taken[0], channels.widen(taken[1], graft.site.channels, total), -1.0)]


def _side_by_side(groups: list[Factors]) -> Factors:
    down = torch.cat([group.down for group in groups])
    up = torch.cat([group.up * group.scale for group in groups], dim=1)
    return Factors(down, up, 1.0)
