"""Seating one module at its site, and taking it away again."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from graftwork.engine import channels, fastpath, offloaded, sequence
from graftwork.engine.adapter import Adapter, Placed
from graftwork.engine.operations import operation_of
from graftwork.engine.seat import GRAFTS, Grafts, Seat, seat_of, stored_parameter
from graftwork.engine.state import State
from graftwork.engine.swap import take_seat
from graftwork.reference.properties import Insertion, Port
from graftwork.reference.site import Access, Kind, Site


def put(model: nn.Module, state: State, place: Placed) -> None:
    """Seat a module at its site and tell the modules around it."""
    site, name = place.site, place.graft.adapter
    host = model.get_submodule(site.module)
    seat = take_seat(host, state, site.module)
    if GRAFTS not in host._modules:
        host.add_module(GRAFTS, Grafts())
    container = host._modules[GRAFTS]
    assert isinstance(container, Grafts)
    if name not in container:
        container[name] = nn.ModuleDict()
    container[name][_child(place)] = place.graft.module.train(host.training)  # type: ignore[operator,index]
    seat.put(place.port, place.graft)
    fastpath.leave(model, host, seat)
    for path, stack in fastpath.stacks(model, site.module):
        take_seat(stack, state, path)
    _ARRANGE[place.port](model, state, seat, host, place)


def remove(model: nn.Module, state: State, adapter: Adapter) -> None:
    """Take an adapter's modules away; modules that keep a duty keep their seat."""
    for path in dict.fromkeys(place.site.module for place in adapter.placed):
        host = submodule(model, path)
        seat = None if host is None else seat_of(host)
        if host is None or seat is None:
            continue
        here = [p for p in adapter.placed if p.site.module == path and adapter.name in seat.at(p.port)]
        seat.drop(adapter.name)
        container = host._modules.get(GRAFTS)
        if isinstance(container, Grafts):
            if adapter.name in container:
                del container[adapter.name]
            if not len(container):
                del host._modules[GRAFTS]
        for place in here:
            _DISARRANGE[place.port](model, state, seat, host, place)
        if seat.slow_path is not None and not seat.ports:
            seat.slow_path.remove()
            seat.slow_path = None


def _arrange_weight(model: nn.Module, state: State, seat: Seat, host: nn.Module, place: Placed) -> None:
    seat.owners = tuple(
        take_seat(model.get_submodule(path), state, path) for path in _owner_paths(model, place.site)
    )
    _count_reads(seat, place.site, 1)


def _disarrange_weight(model: nn.Module, state: State, seat: Seat, host: nn.Module, place: Placed) -> None:
    _count_reads(seat, place.site, -1)


def _count_reads(seat: Seat, site: Site, change: int) -> None:
    owners = (seat,) if site.kind is Kind.TENSOR else seat.owners  # children may run beside what is read here
    for owner in owners:
        owner.readers += change if site.access is Access.READ else 0
        owner.occasional += change if site.access is Access.EITHER else 0


def _arrange_hidden(model: nn.Module, state: State, seat: Seat, host: nn.Module, place: Placed) -> None:
    if place.graft.module.span is not None:
        sequence.count(model, seat, place.site)
    entry = _entry(place)
    if entry is not None:
        first = take_seat(model.get_submodule(entry), state, entry)
        first.keeps_input += 1
        seat.entries = {**seat.entries, entry: first}


def _disarrange_hidden(model: nn.Module, state: State, seat: Seat, host: nn.Module, place: Placed) -> None:
    if place.graft.module.span is not None:
        sequence.uncount(model, seat)
    entry = _entry(place)
    if entry in seat.entries:
        seat.entries[entry].keeps_input -= 1


def _arrange_attention(model: nn.Module, state: State, seat: Seat, host: nn.Module, place: Placed) -> None:
    seat.keeps_input += _reads(place)
    if place.graft.module.shift_positions:
        sequence.follow(model, seat)


def _disarrange_attention(model: nn.Module, state: State, seat: Seat, host: nn.Module, place: Placed) -> None:
    seat.keeps_input -= _reads(place)
    if place.graft.module.shift_positions:
        sequence.unfollow(model, seat)


def _reads(place: Placed) -> bool:
    """Whether a prefix has a gate, which reads what the attention module reads."""
    return getattr(place.graft.module, "gate", None) is not None


def _arrange_sequence(model: nn.Module, state: State, seat: Seat, host: nn.Module, place: Placed) -> None:
    sequence.install(model, host, seat)


def _disarrange_sequence(model: nn.Module, state: State, seat: Seat, host: nn.Module, place: Placed) -> None:
    if not seat.at(Port.SEQUENCE):
        sequence.uninstall(model, host, seat)


Arrange = Callable[[nn.Module, State, Seat, nn.Module, Placed], None]
_ARRANGE: dict[Port, Arrange] = {
    Port.WEIGHT: _arrange_weight,
    Port.HIDDEN: _arrange_hidden,
    Port.ATTENTION: _arrange_attention,
    Port.SEQUENCE: _arrange_sequence,
}
_DISARRANGE: dict[Port, Arrange] = {
    Port.WEIGHT: _disarrange_weight,
    Port.HIDDEN: _disarrange_hidden,
    Port.ATTENTION: _disarrange_attention,
    Port.SEQUENCE: _disarrange_sequence,
}


def _entry(place: Placed) -> str | None:
    site = place.site
    if place.graft.card.insertion is not Insertion.PARALLEL or site.entry in (None, site.module):
        return None
    return site.entry


def _owner_paths(model: nn.Module, site: Site) -> tuple[str, ...]:
    """Modules whose forward may read the site's parameters: its parent, and one more level where the parent
    itself is passed over (torch's encoder layer reads its attention's weights on the fast path)."""
    if site.kind in (Kind.PARAMETER, Kind.TENSOR) or not site.module:
        return ()
    parent = site.module.rpartition(".")[0]
    if not parent or not isinstance(model.get_submodule(parent), nn.MultiheadAttention):
        return (parent,)
    return (parent, parent.rpartition(".")[0])


def _child(place: Placed) -> str:
    plain = re.sub(r"[^A-Za-z0-9_]", "_", place.site.workspace)
    return plain if place.index == 0 else f"{place.index}_{plain}"


def is_adapter_name(key: str) -> bool:
    """Whether a dotted parameter name belongs to an adapter."""
    return GRAFTS in key.split(".")


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """A submodule by its dotted name, None where it no longer exists."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def matrix(model: nn.Module, site: Site) -> Callable[[], Tensor]:
    """Access to the host's weight as an fp32 matrix (its owned channels)."""

    def read() -> Tensor:
        host = model.get_submodule(site.module)
        whole = operation_of(type(host)).matrix(host, _host_tensor(host, site.parameter)).detach()
        whole = whole.float() if whole.element_size() < 4 else whole
        return whole if site.channels is None else channels.take(whole, site.channels, -2)

    return read


def bias(model: nn.Module, site: Site) -> Callable[[], Tensor] | None:
    """Access to the host's bias, None without one."""
    if not site.has_bias:
        return None

    def read() -> Tensor:
        stored = _host_tensor(model.get_submodule(site.module), "bias").detach()
        whole = stored.float() if stored.element_size() < 4 else stored
        return whole if site.channels is None else channels.take(whole, site.channels, -1)

    return read


def _host_tensor(host: nn.Module, name: str) -> Tensor:
    stored = stored_parameter(host, name)
    assert stored is not None
    return offloaded.fetched(host, name, stored)


def embedding_matrix(model: nn.Module, site: Site) -> Callable[[], Tensor] | None:
    """Access to the rows that a stack's embedding answers with, as (channels, vocabulary), None without a table."""
    if site.kind is not Kind.STACK:
        return None
    stack: Any = model.get_submodule(site.module)
    table: Any = stack.get_input_embeddings() if hasattr(stack, "get_input_embeddings") else None
    if table is None or getattr(table, "weight", None) is None or table.weight.dim() != 2:
        return None
    return lambda: table.weight.detach().float().mT * float(getattr(table, "embed_scale", 1.0))
