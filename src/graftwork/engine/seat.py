"""What graftwork puts on a host module: a `Seat` in its `__dict__`, and a `Grafts` child for tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.engine.state import State
from graftwork.reference.card import Card
from graftwork.reference.properties import Port
from graftwork.reference.site import Site

SEAT = "_graft"
GRAFTS = "grafts"


@dataclass(frozen=True)
class Graft:
    """One module of one adapter at one site."""

    adapter: str
    technique: str
    site: Site
    card: Card
    module: nn.Module


class Grafts(nn.ModuleDict):
    """Adapter tensors below a host module: adapter name -> modules. Base checkpoints load past it."""

    def __init__(self) -> None:
        super().__init__()
        self._register_load_state_dict_pre_hook(_keep_what_is_here, with_module=True)


def _keep_what_is_here(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """A checkpoint that knows nothing of an adapter leaves it as it is, also under strict loading."""
    for name, child in module.named_children():
        start = f"{prefix}{name}."
        if not any(key.startswith(start) for key in state):
            state.update({start + key: value for key, value in child.state_dict(keep_vars=True).items()})


class Seat:
    """The duties of one host module.

    Attributes:
        state: of the whole model.
        path: dotted name of the module.
        ports: port -> adapter name -> grafts here.
        owners: seats of the modules whose forward may read this module's parameters.
        depth: how many forwards of this module are running (it is an owner while above zero).
        raw: the module itself is being called, so its parameters read as stored.
        values: parameter values that stand in for the stored ones during the module's own forward.
        readers: how many sites below are only read, so that a routed batch must be split here.
        occasional: how many sites below are called on some paths and read on others.
        keeps_input: how many parallel modules at the end of a block read what this module reads.
        kept: that input, from this module's call to the block's end.
        entries: path -> seat of first modules of the blocks that end here.
        lean: a form of the module's forward that keeps less for backward, where it fits.
        around: runs the module's forward in place of a plain call (sequence port).
        root: the module is the model that was attached to.
        saving: `save_pretrained` is running.
        slow_path: handle of the hook that keeps torch's encoder layer from skipping this module.
        touched: ports the host came by since the last check.
        kept_stack: the factors of a route's adapters as one stack, kept while nothing trains.
    """

    def __init__(self, state: State, path: str) -> None:
        self.state = state
        self.path = path
        self.ports: dict[Port, dict[str, tuple[Graft, ...]]] = {}
        self.owners: tuple[Seat, ...] = ()
        self.depth = 0
        self.raw = False
        self.values: dict[str, Tensor] | None = None
        self.readers = 0
        self.occasional = 0
        self.keeps_input = 0
        self.kept: Tensor | None = None
        self.entries: dict[str, Seat] = {}
        self.lean: Callable[..., Any] | None = None
        self.around: Callable[..., Any] | None = None
        self.root = False
        self.saving = False
        self.slow_path: Any = None
        self.touched: frozenset[Port] = frozenset()
        self.kept_stack: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept_stack": None}

    def touch(self, port: Port) -> None:
        """Note that the host came by this port (looked at after the first forward only)."""
        if not torch.compiler.is_compiling() and self.state.unreached:
            self.touched = self.touched | {port}

    def at(self, port: Port) -> dict[str, tuple[Graft, ...]]:
        """Grafts at one port by adapter name."""
        return self.ports.get(port, {})

    def running(self, port: Port) -> tuple[tuple[str, tuple[Graft, ...]], ...]:
        """(name, grafts) of the adapters that take part in this forward, in stacking order."""
        here = self.ports.get(port)
        if not here:
            return ()
        return tuple((name, here[name]) for name in self.state.serving if name in here)

    def put(self, port: Port, graft: Graft) -> None:
        """Add a graft (values are replaced, never mutated)."""
        here = dict(self.at(port))
        here[graft.adapter] = (*here.get(graft.adapter, ()), graft)
        self.ports = {**self.ports, port: here}

    def drop(self, adapter: str) -> None:
        """Remove everything of an adapter."""
        kept = {
            port: {name: grafts for name, grafts in here.items() if name != adapter}
            for port, here in self.ports.items()
        }
        self.ports = {port: here for port, here in kept.items() if here}


def seat_of(module: nn.Module) -> Seat | None:
    """The seat on a module, None on one that graftwork has not touched."""
    return module.__dict__.get(SEAT)


def stored_parameter(module: nn.Module, name: str) -> Tensor | None:
    """A parameter as stored, whatever is running."""
    if name in module._parameters:
        return module._parameters[name]
    seat = seat_of(module)
    if seat is None:
        return getattr(module, name, None)
    before, seat.raw = seat.raw, True
    try:
        return getattr(module, name, None)
    finally:
        seat.raw = before
