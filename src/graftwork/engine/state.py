"""The state of one model: which adapters are attached, active and merged, and how the batch is routed.

One plain object per model, referenced by every seat. Verbs replace its values and never mutate them, so that a
snapshot is a few references and activation recomputation can be given the state of its own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftwork.engine.route import Route

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.engine.adapter import Adapter


@dataclass(frozen=True)
class Snapshot:
    """What a recomputation needs of the state."""

    active: tuple[str, ...]
    route: Route | None


class State:
    """What graftwork knows of one model.

    Attributes:
        adapters: name -> attached adapter, in the order of attachment.
        active: names whose modules run, in stacking order. A route, while one is set, takes their place.
        route: which adapter serves which sample or token, or None.
        merged: names folded into the base weights.
        before_merge: what was active before merging.
        originals: (module name, parameter name) -> the base tensor before merging, and the shared parameter
            it was split from, if it was.
        frozen: base parameter name -> requires_grad as found at the first attach.
        seated: dotted names of the modules that carry a seat.
        unreached: the next forward checks that the host came by every running site.
        ungraded: the next backward checks that each trainable adapter tensor got a gradient.
    """

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.route: Route | None = None
        self.merged: tuple[str, ...] = ()
        self.before_merge: tuple[str, ...] = ()
        self.originals: dict[tuple[str, str], tuple[Tensor, Tensor | None]] = {}
        self.frozen: dict[str, bool] = {}
        self.seated: frozenset[str] = frozenset()
        self.unreached = False
        self.ungraded = False

    @property
    def running(self) -> tuple[str, ...]:
        """Names that take part in a forward: those of the route, else the active ones."""
        return self.active if self.route is None else self.route.names

    def snapshot(self) -> Snapshot:
        """The values a recomputation must see."""
        return Snapshot(self.active, self.route)


def carrying(state: State, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` bound to today's active set and route, whatever they are when it is called again."""
    snapshot = state.snapshot()

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        before = state.snapshot()
        state.active, state.route = snapshot.active, snapshot.route
        try:
            return function(*args, **kwargs)
        finally:
            state.active, state.route = before.active, before.route

    return recomputed
