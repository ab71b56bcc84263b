"""The keys and values that running prefixes give to one forward of an attention module.

B samples, H key heads, N prefix positions, D head width, W = H D
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.engine.route import Route
from graftwork.engine.seat import Graft, Seat
from graftwork.engine.sequence_shift import Shift, shifts
from graftwork.errors import RouteError, StateError
from graftwork.reference.properties import Port

Running = tuple[tuple[str, tuple[Graft, ...]], ...]
Laid = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Prefix:
    """Keys and values (B, H, N, D) of one forward.

    Attributes:
        seen: (B, N), which of them each sample has; None: all.
        shift: the move of own positions behind them, where a relative bias has to know.
    """

    keys: Tensor
    values: Tensor
    seen: Tensor | None
    shift: Shift | None = None

    @property
    def length(self) -> int:
        """Number of positions, those left empty in some rows included."""
        return self.keys.shape[2]


_known: WeakKeyDictionary[Route, dict[tuple[object, ...], Laid]] = WeakKeyDictionary()


def gather(seat: Seat, key: Tensor, value: Tensor) -> Prefix | None:
    """The prefix of this forward, in the precision of `key` (B, H, K, D); None when no sample has one."""
    running = seat.running(Port.ATTENTION)
    if not running:
        return None
    route = seat.state.rows
    if route is not None and not torch.compiler.is_compiling():  # a compiled graph must serve any index
        running = tuple(entry for entry in running if route.uses(entry[0]))
    if not running:
        return None
    if route is not None and route.per_token:
        raise RouteError(
            f"{seat.path}: a prefix is read by a whole row's attention and cannot be routed per token "
            f"({', '.join(name for name, _ in running)}). Route per sample: an index of shape (batch,)"
        )
    pairs = [_of_adapter(seat, grafts, key, value) for _, grafts in running]
    parts = [(torch.cat([k for k, _ in each]), torch.cat([v for _, v in each])) for each in pairs]
    gates = _gates(seat, running, pairs)
    if route is None:
        keys, values = [torch.cat(side).expand(len(key), -1, -1) for side in zip(*parts, strict=True)]
        if gates is not None:
            values = values * torch.cat(gates).mT.unsqueeze(-1)
        return Prefix(_heads(keys, key), _heads(values, value), None, _shift(seat))
    rows, seen = _layout(route, running, [len(keys) for keys, _ in parts], key)
    keys, values = [_table(side).index_select(0, rows) for side in zip(*parts, strict=True)]
    if gates is not None:
        own = _table(tuple(gates))[rows, :, torch.arange(len(rows), device=rows.device)]
        values = values * own.unsqueeze(-1)
    return Prefix(_heads(keys, key), _heads(values, value), seen, _shift(seat))


def _gates(seat: Seat, running: Running, pairs: list[list[tuple[Tensor, Tensor]]]) -> list[Tensor] | None:
    """(N, B) of each adapter: how far a row's gate lets its values through; None where none has a gate."""
    gates = [[getattr(graft.module, "gate", None) for graft in grafts] for _, grafts in running]
    if not any(gate is not None for each in gates for gate in each):
        return None
    x, seat.kept = seat.kept, None
    assert x is not None  # kept by the attention module's own call
    frame = seat.state.slots
    real = None if frame is None else frame.real(x)
    return [
        torch.cat([_opened(gate, x, real, values) for gate, (_, values) in zip(each, own, strict=True)])
        for each, own in zip(gates, pairs, strict=True)
    ]


def _opened(gate: nn.Module | None, x: Tensor, real: Tensor | None, values: Tensor) -> Tensor:
    """(N, B) the gate of each row, for each of its values (N, W)."""
    rows = values.new_ones(len(x)) if gate is None else gate(x, real).to(values.dtype)
    return rows.expand(len(values), -1)


def _shift(seat: Seat) -> Shift | None:
    frame = seat.state.slots
    shift = None if frame is None else frame.shift
    return shift if shift is not None and shift.bias is not None and shifts(seat) else None


def _of_adapter(
    seat: Seat, grafts: tuple[Graft, ...], key: Tensor, value: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (N, W) of each graft of one adapter here."""
    pairs = [graft.module() for graft in grafts]
    for graft, (keys, values) in zip(grafts, pairs, strict=True):
        widths, wanted = (keys.shape[-1], values.shape[-1]), (_width(key), _width(value))
        if widths != wanted:
            raise StateError(
                f"{seat.path}: prefix {graft.adapter!r} has keys and values of width {widths}, "
                f"this attention of {wanted}; build it with the widths of site {graft.site.key}"
            )
    return [(keys.to(key.dtype), values.to(value.dtype)) for keys, values in pairs]


def _width(states: Tensor) -> int:
    return states.shape[1] * states.shape[3]


def _heads(rows: Tensor, like: Tensor) -> Tensor:
    """(B, N, W) -> (B, H, N, D)."""
    return rows.unflatten(-1, (like.shape[1], like.shape[3])).transpose(1, 2)


def _table(parts: tuple[Tensor, ...]) -> Tensor:
    """(adapters + 1, N, W): padded prefixes and, last, an empty one for samples without."""
    longest = max(map(len, parts))
    padded = [functional.pad(part, (0, 0, 0, longest - len(part))) for part in parts]
    return torch.stack([*padded, torch.zeros_like(padded[0])])


def _layout(route: Route, running: Running, lengths: list[int], key: Tensor) -> Laid:
    """(B,) row of the table for each sample, (B, N) which positions it has (None: all)."""
    if torch.compiler.is_compiling():
        return _laid(route, running, lengths, key)
    slot = (tuple(name for name, _ in running), tuple(lengths), len(key))
    known = _known.setdefault(route, {})
    if slot not in known:
        known[slot] = _laid(route, running, lengths, key)
    return known[slot]


def _laid(route: Route, running: Running, lengths: list[int], key: Tensor) -> Laid:
    names = [name for name, _ in running]
    index = route.fit(len(key), None).to(key.device)
    here = [names.index(name) if name in names else len(names) for name in route.names]
    rows = torch.tensor([*here, len(names)], device=key.device)[index]  # index -1 takes the last entry
    if len(set(lengths)) == 1 and not torch.compiler.is_compiling() and not route.leaves_out(names):
        return rows, None
    counts = torch.tensor([*lengths, 0], device=key.device)[rows]
    return rows, torch.arange(max(lengths), device=key.device) < counts[:, None]
