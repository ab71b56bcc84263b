"""The verbs on an attached model. Of three sets (attached, active, trainable) a verb changes one.

Each setting verb works as a statement, and as a context manager that restores exactly what it found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from torch import Tensor, nn

from graftwork.engine.adapter import Adapter
from graftwork.engine.attach import require, state_of
from graftwork.engine.blend import Blend
from graftwork.engine.chosen import Chosen, Router
from graftwork.engine.hints import Encoding, hints_of
from graftwork.engine.route import Route
from graftwork.engine.seat import seat_of
from graftwork.engine.state import Routing, State
from graftwork.errors import BadData, RouteError, StateError
from graftwork.reference.properties import Port


class Restore:
    """What a setting verb returns: leaving the `with` block puts back what was there before."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo()


def adapters(model: nn.Module) -> Mapping[str, Adapter]:
    """Name -> adapter, in the order of attachment; empty on a model that nothing is attached to."""
    seat = seat_of(model)
    return dict(seat.state.adapters) if seat is not None and seat.root else {}


def active(model: nn.Module, *names: str) -> Restore:
    """Run these adapters, stacked in this order (none: the bare base). Costs one assignment."""
    state = state_of(model)
    for name in names:
        require(state, name)
        if name in state.merged:
            raise StateError(f"{name!r} is merged into the base and would count twice; unmerge first")
    before = state.choice()
    if before.route is not None or before.chosen is not None:
        raise StateError(
            "a route is set and decides which adapters run; end it first (graftwork.route(model, None))"
        )
    state.choose(before._replace(active=tuple(names)))
    return Restore(lambda: state.choose(state.choice()._replace(active=before.active)))


def trainable(model: nn.Module, *names: str) -> Restore:
    """Train exactly these adapters (none: all are frozen)."""
    state = state_of(model)
    wanted = {name: require(state, name) for name in names}
    before = {id(p): p.requires_grad for adapter in state.adapters.values() for p in adapter.parameters()}
    for name, adapter in state.adapters.items():
        for parameter in adapter.parameters():
            parameter.requires_grad_(name in wanted)
    checked, state.ungraded = state.ungraded, bool(wanted) and state.verify
    training, state.training = state.training, tuple(wanted)

    def undo() -> None:
        state.ungraded, state.training = checked, tuple(name for name in training if name in state.adapters)
        for adapter in state.adapters.values():
            for parameter in adapter.parameters():
                parameter.requires_grad_(before.get(id(parameter), parameter.requires_grad))

    return Restore(undo)


def route(
    model: nn.Module,
    names: Sequence[str] | None,
    index: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    by: Router | None = None,
) -> Restore:
    """Serve each sample or token of the next batches by its own adapter, or by a weighted sum of adapters.

    Args:
        names: the adapters that `index` points into; None ends the route.
        index: integer tensor (B,) or (B, T) with values in [-1, N), moved to the model's device; -1 is the bare base.
        weights: instead of an index, floating point (B, N), (B, T, N) or (B, T, L, N): each site answers
            y_0 + Σ_n w_n (y_n - y_0), with gradients to the weights. At the weight and the hidden port.
        by: instead of either, a function of the model and its arguments by name that gives an index or weights; it
            is asked in each forward of the model, with no adapter running.
    """
    state = state_of(model)
    given = [each for each in (index, weights, by) if each is not None]
    if len(given) != (0 if names is None else 1):
        raise RouteError(
            "a route needs names and one of index, weights and by=router; route(model, None) ends it"
        )
    for name in names or ():
        require(state, name)
        if name in state.merged:
            raise StateError(f"{name!r} is merged into the base and cannot be routed; unmerge first")
    parameter = next(model.parameters(), None)
    device = None if parameter is None or parameter.is_meta else parameter.device
    route: Routing | None = None
    if names is not None and index is not None:
        route = Route(names, index if device is None else index.to(device))
    elif names is not None and weights is not None:
        _refuse_unblendable(state, names)
        route = Blend(names, weights if device is None else weights.to(device))
    chosen = None if names is None or by is None else Chosen(names, by)
    before = state.choice()
    state.choose(before._replace(route=route, chosen=chosen))
    return Restore(lambda: state.choose(state.choice()._replace(route=before.route, chosen=before.chosen)))


def hints(
    model: nn.Module,
    *,
    query: Encoding | None = None,
    passage: Encoding | None = None,
    position: Tensor | None = None,
) -> Restore:
    """Tell adapters that write hints (query-prompt) which query and passage each row of the next batches is about.

    Args:
        query, passage: `input_ids` (B, M) and `attention_mask` as a tokenizer gives them; tokens that the mask hides
            are not used. Neither ends the hints.
        position: (B,) number of real positions that stay in front of the hints; None puts them at the front.

    Raises BadData for rows, masks, tokens or positions that do not fit, StateError where no adapter reads hints.
    """
    state = state_of(model)
    if (query is None) != (passage is None) or (position is not None and query is None):
        raise BadData("hints need a query and a passage; hints(model) alone ends them")
    if query is not None and not reads_hints(model):
        raise StateError(
            f"no attached adapter reads hints ({', '.join(state.adapters) or 'none'} attached); attach QueryPrompt"
        )
    found = None if query is None or passage is None else hints_of(model, query, passage, position)
    before = state.choice()
    state.choose(before._replace(hints=found))
    return Restore(lambda: state.choose(state.choice()._replace(hints=before.hints)))


def reads_hints(model: nn.Module) -> bool:
    """Whether an attached adapter writes hints from queries and passages."""
    modules = (module for adapter in adapters(model).values() for module in adapter.modules.values())
    return any(getattr(module, "hinted", False) for module in modules)


def as_found(model: nn.Module, *, checks: bool = False) -> Restore:
    """Attach and detach within; leaving puts back what was active, routed and trainable.

    Args:
        checks: put back too what the next forward and backward check, so that what was attached is not checked.
    """
    before = adapters(model)
    state = state_of(model) if before else State()
    choice, training, checked = state.snapshot(), state.training, (state.unreached, state.ungraded)
    flags = {id(p): p.requires_grad for adapter in before.values() for p in adapter.parameters()}

    def undo() -> None:
        if not adapters(model):
            return
        state = state_of(model)
        state.active = tuple(name for name in choice.active if name in state.adapters)
        state.training = tuple(name for name in training if name in state.adapters)
        state.route, state.chosen = choice.route, choice.chosen
        state.ungraded = state.ungraded and bool(training)
        if checks:
            state.unreached, state.ungraded = checked
        for adapter in state.adapters.values():
            for parameter in adapter.parameters():
                parameter.requires_grad_(flags.get(id(parameter), False))

    return Restore(undo)


def _refuse_unblendable(state: State, names: Sequence[str]) -> None:
    for name in names:
        ports = sorted({card.port for card in state.adapters[name].cards} - {Port.WEIGHT, Port.HIDDEN})
        if ports:
            raise RouteError(
                f"{name!r} works at the {ports[0]} port, whose extra positions cannot be blended by weights; "
                "route it by an index"
            )
