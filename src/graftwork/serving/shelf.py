"""A shelf of adapters: thousands on disk, some in host memory, a few on the model.

Names are registered with the files they come from. A batch names the adapter of each of its rows; those that are not
on the model yet take the places of those that were used longest ago. Low-rank adapters go into slots that were attached
once (a copy of the values, no attaching); others are attached and detached.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from graftwork.adapters.installing import base_of, check_identity, install
from graftwork.adapters.store import locate, read
from graftwork.adapters.stored import StoredAdapter
from graftwork.adapters.swapping import fitted, put
from graftwork.engine.adapter import Adapter
from graftwork.engine.attach import attach, detach
from graftwork.engine.verbs import active, adapters, as_found, route
from graftwork.errors import BadFile, BadOption, StateError, UnknownName, nearest
from graftwork.reference.technique import Technique


@dataclass
class _Resident:
    """A registered adapter that is on the model: under which name, in a slot or attached, in use by how many."""

    attached: str
    slot: bool
    users: int = 0


class Shelf:
    """Registered adapters of one model.

    Args:
        model: the base; adapters already attached to it stay beside the shelf's.
        slot: what each place is made of, `LoRA(rank=R, workspaces=...)` with the largest rank and all the workspaces
            that are served. None: every adapter is attached and detached.
        places: how many adapters are on the model at most; a batch may name as many.
        in_memory: how many adapters are kept in host memory besides.
    """

    def __init__(
        self, model: nn.Module, slot: Technique | None = None, *, places: int = 32, in_memory: int = 1024
    ) -> None:
        if places < 1 or in_memory < 1:
            raise BadOption(f"a shelf needs at least one place in each memory, not {places} and {in_memory}")
        self._model = model
        self._places = places
        self._in_memory = in_memory
        self._paths: dict[str, Path] = {}
        self._held: OrderedDict[str, Future[StoredAdapter]] = OrderedDict()
        self._resident: OrderedDict[str, _Resident] = OrderedDict()
        self._slots: list[Adapter] = []
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="graftwork-shelf")
        if slot is not None:
            with as_found(model):
                self._slots = [
                    attach(model, slot, name=f"shelf-{number}", head=False) for number in range(places)
                ]
        self._free = [adapter.name for adapter in self._slots]
        self._base = base_of(model)

    def register(self, name: str, path: str | Path) -> None:
        """Make an adapter known by a name; its file is read when it is first used or prefetched."""
        with self._lock:
            if name in self._paths:
                raise StateError(
                    f"{name!r} is registered already, from {self._paths[name]}; unregister it first"
                )
            self._paths[name] = locate(Path(path))

    def unregister(self, name: str) -> None:
        """Forget a name, in every memory. StateError while a batch uses it."""
        with self._lock:
            self._require(name)
            if name in self._resident:
                if self._resident[name].users:
                    raise StateError(
                        f"{name!r} is in use by a batch; leave its `with` block, then unregister"
                    )
                self._evict(name)
            self._held.pop(name, None)
            del self._paths[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Everything registered."""
        return tuple(self._paths)

    @property
    def on_model(self) -> tuple[str, ...]:
        """What is on the model now, the longest unused first."""
        return tuple(self._resident)

    def prefetch(self, names: Sequence[str], *, wait: bool = False) -> None:
        """Begin to read files into host memory, in a thread of its own; `serve` waits for what it needs.

        Args:
            wait: until they are read; raises what reading them raises.
        """
        with self._lock:
            for name in names:
                self._require(name)
            begun = [self._fetch(name) for name in names]
        if wait:
            for each in begun:
                each.result()

    @contextmanager
    def serve(self, rows: Sequence[str | None]) -> Iterator[None]:
        """Route the batches of this block, row i by adapter `rows[i]` (None: the bare base).

        Raises:
            UnknownName: a row names what is not registered. StateError: more adapters than places, or all places
            are in use by other blocks. BadFile, WrongBase: an adapter does not fit. What runs is then as it was.
        """
        wanted = list(dict.fromkeys(name for name in rows if name is not None))
        with self._lock:
            for name in wanted:
                self._require(name)
            if len(wanted) > self._places:
                raise StateError(
                    f"the batch names {len(wanted)} adapters, the shelf has {self._places} places"
                )
            used = self._take(wanted)
        try:
            number = {name: place for place, name in enumerate(wanted)}
            index = torch.tensor([-1 if name is None else number[name] for name in rows])
            with route(self._model, used, index) if used else active(self._model):
                yield
        finally:
            with self._lock:
                for name in wanted:
                    self._resident[name].users -= 1

    def close(self) -> None:
        """Take everything of the shelf off the model. StateError while a batch uses any."""
        with self._lock:
            busy = [name for name, resident in self._resident.items() if resident.users]
            if busy:
                raise StateError(
                    f"{', '.join(busy)} is in use by a batch; leave its `with` block, then close"
                )
            self._reader.shutdown(cancel_futures=True)
            for name in list(self._resident):
                self._evict(name)
            if self._slots:
                detach(self._model, *(adapter.name for adapter in self._slots))
            self._slots, self._free, self._paths = [], [], {}
            self._held.clear()

    def _require(self, name: str) -> None:
        if name not in self._paths:
            raise UnknownName(f"{name!r} is not registered. {nearest(name, self._paths)}")

    def _fetch(self, name: str) -> Future[StoredAdapter]:
        if name not in self._held:
            self._held[name] = self._reader.submit(read, self._paths[name], self._model)
        self._held.move_to_end(name)
        while len(self._held) > self._in_memory:
            self._held.popitem(last=False)
        return self._held[name]

    def _take(self, wanted: list[str]) -> list[str]:
        """Bring the adapters of a batch onto the model and count it as their user; all or nothing for the counts."""
        taken: list[str] = []
        for name in wanted:
            if name not in self._resident:
                self._fetch(name)  # all are begun before the first is waited for
        try:
            for name in wanted:
                if name not in self._resident:
                    self._bring(name)
                self._resident[name].users += 1
                self._resident.move_to_end(name)
                taken.append(name)
        except BaseException:
            for name in taken:
                self._resident[name].users -= 1
            raise
        return [self._resident[name].attached for name in wanted]

    def _bring(self, name: str) -> None:
        """Put one adapter on the model, in the place of the longest unused where all are taken."""
        try:
            stored = self._fetch(name).result()
        except BaseException:
            self._held.pop(name, None)  # the file may be mended
            raise
        check_identity(self._base, stored.manifest.base, name)
        values = _values(self._slots[0], stored) if self._slots else None
        self._make_room(values is not None)
        if values is not None:
            place = self._free[-1]
            put(self._model, adapters(self._model)[place], values)
            self._free.pop()
            self._resident[name] = _Resident(place, slot=True)
            return
        with as_found(self._model):
            adapter = install(self._model, stored, f"shelf-own-{next(self._numbers)}", allow_other_base=True)
        self._resident[name] = _Resident(adapter.name, slot=False)

    def _make_room(self, for_slot: bool) -> None:
        while len(self._resident) >= self._places or (for_slot and not self._free):
            unused = [
                name
                for name, resident in self._resident.items()
                if not resident.users and (resident.slot or not for_slot or self._free)
            ]
            if not unused:
                raise StateError(
                    f"all {self._places} places of the shelf are in use by batches; leave their `with` blocks, or make "
                    "the shelf with more places"
                )
            self._evict(unused[0])

    def _evict(self, name: str) -> None:
        resident = self._resident.pop(name)
        if resident.slot:
            self._free.append(resident.attached)
        else:
            with as_found(self._model):
                detach(self._model, resident.attached)


def _values(slot: Adapter, stored: StoredAdapter) -> dict[str, Tensor] | None:
    """What a slot holds of an adapter (all slots alike), None where it does not fit into one."""
    try:
        return fitted(slot, stored)
    except BadFile:
        return None
