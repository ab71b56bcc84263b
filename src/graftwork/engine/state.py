"""The state of one model: which adapters are attached, active and merged, and how the batch is routed.

One plain object per model, referenced by every seat. Verbs replace its values and never mutate them, so that
a snapshot is a few references and activation recomputation can be given the state of its own forward.

Threads: calls of one model take turns. The thread that attached sets what runs for every thread; another
thread sets it for itself, and its choice is installed for the time of its own calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from graftwork.engine.blend import Blend
from graftwork.engine.presence import Facts
from graftwork.engine.route import Route
from graftwork.errors import RouteError, StateError

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.engine.adapter import Adapter
    from graftwork.engine.assigned import Assigned
    from graftwork.engine.chosen import Chosen
    from graftwork.engine.hints import Hints


Routing = Route | Blend


class _Own(threading.local):
    """What the present thread chose for itself, model by model."""

    def __init__(self) -> None:
        self.choices: WeakKeyDictionary[State, Snapshot] = WeakKeyDictionary()


_own = _Own()


class Snapshot(NamedTuple):
    """What runs: all that a recomputation, or a thread, needs of the state."""

    active: tuple[str, ...]
    route: Routing | None
    slots: Any = None
    chosen: Chosen | None = None
    hints: Hints | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that take part."""
        decides = self.route or self.chosen
        return self.active if decides is None else decides.names


class State:
    """What graftwork knows of one model.

    Attributes:
        adapters: name -> attached adapter, in the order of attachment.
        active: names whose modules run, in stacking order. A route, while one is set, takes their place.
        training: names that a verb made trainable last; what is done to a tensor's `requires_grad` by hand
            is not here.
        route: which adapter serves which sample or token, or how they blend, or None.
        chosen: the router that decides the route of each forward of the model, or None.
        hints: the query and the passage of each row, for modules that write hints from them, or None.
        slots: where the stack that is running has put extra positions, for its layers (sequence port), or
            None.
        merged: names folded into the base weights.
        before_merge: what was active before merging.
        originals: (module name, parameter name) -> the base tensor before merging, and the shared parameter
            it was split from, if it was.
        frozen: base parameter name -> requires_grad as found at the first attach.
        seated: dotted names of the modules that carry a seat.
        facts: how the sites were reached when they were grafted.
        verify: the last attach asked for the two checks that follow.
        unreached: the next forward checks that the host came by every running site.
        ungraded: the next backward checks that each trainable adapter tensor got a gradient.
        assigning: an objective asks which experts tokens go to.
        assigned: what the routers of modules decided in the model's last forward, where it is asked.
        lock: held while a seated module is called, so that threads take turns.
        home: the thread that attached; its choices hold for every thread without one of its own.
        threaded: another thread has made a choice of its own.
        turns: how many calls inside one another have installed a choice.
        changes, ran_at: number of choices so far, and what it was when a forward last ran.
    """

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.training: tuple[str, ...] = ()
        self.route: Routing | None = None
        self.chosen: Chosen | None = None
        self.hints: Hints | None = None
        self.slots: Any = None
        self.merged: tuple[str, ...] = ()
        self.before_merge: tuple[str, ...] = ()
        self.originals: dict[tuple[str, str], tuple[Tensor, Tensor | None]] = {}
        self.frozen: dict[str, bool] = {}
        self.seated: frozenset[str] = frozenset()
        self.facts = Facts()
        self.verify = True
        self.unreached = False
        self.ungraded = False
        self.assigning = False
        self.assigned: tuple[Assigned, ...] = ()
        self.lock = threading.RLock()
        self.home = threading.get_ident()
        self.threaded = False
        self.turns = 0
        self.changes = 0
        self.ran_at = 0

    def __getstate__(self) -> dict[str, Any]:
        fleeting = ("assigned", "lock", "home", "threaded", "turns")
        return {key: value for key, value in self.__dict__.items() if key not in fleeting}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(values)

    @property
    def running(self) -> tuple[str, ...]:
        """Names that take part in a forward: those of the route, else the active ones."""
        return self.snapshot().names

    @property
    def serving(self) -> tuple[str, ...]:
        """The same, within a forward."""
        if self.chosen is not None:
            raise RouteError(
                "a router decides the route when the model itself is called, and a part of it was called alone; "
                "call the model, or route by an index"
            )
        return self.active if self.route is None else self.route.names

    @property
    def rows(self) -> Route | None:
        """The route by index, None without one; for ports where answers cannot be blended."""
        if isinstance(self.route, Blend):
            raise RouteError("prompts and prefixes cannot be blended by weights; route them by an index")
        return self.route

    def snapshot(self) -> Snapshot:
        """What runs now."""
        return Snapshot(self.active, self.route, self.slots, self.chosen, self.hints)

    def choice(self) -> Snapshot:
        """What the present thread has chosen to run."""
        with self.lock:
            return _own.choices.get(self) or self.snapshot()

    def choose(self, choice: Snapshot) -> None:
        """Set what runs: for every thread, or from another thread than the one that attached for that one."""
        with self.lock:
            self.changes += 1
            if threading.get_ident() == self.home:
                self._install(choice)
            else:
                self.threaded = True
                _own.choices[self] = choice

    @contextmanager
    def turn(self, choice: Snapshot | None = None) -> Iterator[None]:
        """Run with a choice installed, by default the thread's own; calls inside see what is installed."""
        with self.lock:
            before = self.snapshot()
            if choice is None and self.turns == 0:
                choice = _own.choices.get(self)
                self._check_present(choice)
            if choice is not None:
                self._install(choice)
            self.turns += 1
            try:
                yield
            finally:
                self.turns -= 1
                self._install(before)

    def _install(self, choice: Snapshot) -> None:
        self.active, self.route, self.slots, self.chosen, self.hints = choice

    def _check_present(self, choice: Snapshot | None) -> None:
        for name in () if choice is None else choice.names:
            if name not in self.adapters or name in self.merged:
                raise StateError(
                    f"{name!r} was detached or merged since this thread chose it; choose again (gw.active)"
                )


def carrying(state: State, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` bound to what runs today, whatever runs when it is called again."""
    if torch.compiler.is_compiling():  # a compiled graph is recomputed without running Python again
        return function
    snapshot = state.snapshot()

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        with state.turn(snapshot):
            return function(*args, **kwargs)

    return recomputed


def note_forward(state: State) -> None:
    """Refuse a recomputation that nobody carries the state into after the choice has changed.

    A checkpoint of the caller's own (`torch.utils.checkpoint`) runs a module again during backward. What was
    active then is not known, only that it may not be what is active now.
    """
    if torch._C._current_graph_task_id() == -1:
        state.ran_at = state.changes
    elif state.turns == 0 and state.ran_at != state.changes:
        raise StateError(
            "a module is recomputed in backward, but the active adapters or the route changed since its "
            "forward. "
            "Keep them until backward has run, or use the model's own activation_checkpointing_enable()"
        )
