"""Which positions running prompts give to each row of one forward of a stack.

B samples, n slots, R distinct rows (1, or one for each routed adapter and an empty one), C channels
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graftwork.engine.hints import Hints
from graftwork.engine.seat import Graft, Seat
from graftwork.engine.sequence_layout import Layout, behind_one_another, leading, table
from graftwork.engine.sequence_shift import Shift
from graftwork.engine.sequence_spans import Extent
from graftwork.errors import RouteError, StateError
from graftwork.reference.properties import Port


@dataclass(frozen=True)
class Share:
    """Slots of one adapter: put in at the stack's input, and overwritten at each layer (deep).

    `front`: before the positions that otherwise stay in front of a prompt. `stays`: left in the stack's output.
    `used`: (B, length) which of them each row has, None: all. `position`: (B,) own positions in front of them,
    `furthest` the most of these.
    """

    name: str
    shallow: Tensor | None
    deep: int
    length: int
    front: bool
    stays: bool
    used: Tensor | None = None
    position: Tensor | None = None
    furthest: int = 0


class Slots:
    """The slots of one forward.

    Attributes:
        rows: the shares of each distinct row, in order.
        row_of: (B,) which of them each sample has; None: the first.
        length: n.
        stays: they are left in the stack's output.
        causal: the stack looks back only.
        layout: where they lie; None until they are put in.
        total: positions of a row, slots included, where layers put them in.
        mask: what layers are given where slots are of different lengths, made by the first that asks.
    """

    def __init__(self, rows: list[list[Share]], row_of: Tensor | None, causal: bool) -> None:
        self.rows = rows
        self.row_of = row_of
        self.sums = [sum(share.length for share in row) for row in rows]
        self.length = max(self.sums)
        self.stays = _agreed(rows)
        self.causal = causal
        self.layout: Layout | None = None
        self.total = 0
        self.mask: Any = None

    @property
    def names(self) -> str:
        """The prompts' adapters, for messages."""
        return ", ".join(dict.fromkeys(repr(share.name) for row in self.rows for share in row))

    @property
    def ragged(self) -> bool:
        """Whether rows may differ in length (known without a look at the device)."""
        return len(set(self.sums)) > 1

    @property
    def placed(self) -> bool:
        """Whether a prompt goes to a place of each sample's own."""
        return any(share.position is not None for row in self.rows for share in row)

    @property
    def furthest(self) -> int:
        """How many own positions a row needs so that its prompt finds its place (known without the device)."""
        return max([share.furthest for row in self.rows for share in row], default=0)

    @property
    def partly(self) -> bool:
        """Whether samples have different parts of one prompt."""
        return any(share.used is not None for row in self.rows for share in row)

    def lay_out(
        self, mask: Tensor | None, batch: int, keep: int, front: bool, device: torch.device
    ) -> Layout:
        """Place the slots in a batch: behind leading padding of `mask` (B, T) and `keep` more positions,
        which prompts at the very front go before."""
        start = self._kept(batch, keep, device)
        if mask is not None:
            start = leading(mask, start)
        counts = self._counts(batch, device) if self.ragged or self.partly else None
        self.layout = Layout(self.length, start, counts, front)
        return self.layout

    def _counts(self, batch: int, device: torch.device) -> Tensor:
        """(B,) positions of each sample's prompt."""
        if self.partly:
            return self._used(batch, device).sum(1)
        return torch.tensor(self.sums, device=device)[self.row_of]

    def _kept(self, batch: int, keep: int, device: torch.device) -> Tensor:
        """(B,) positions that stay in front of each row's prompt; all `keep` of them where it has none."""
        if self.placed:
            placed = [_placed(row) for row in self.rows]
            rows = [
                torch.full((batch,), keep, device=device) if position is None else position.to(device)
                for position in placed
            ]
            return self._of_batch(torch.stack(rows), batch, own=True)
        kept = [0 if keep and _is_front(row) else keep for row in self.rows]
        if self.row_of is None or len(set(kept)) == 1:
            return torch.full((batch,), kept[0], device=device)
        return torch.tensor(kept, device=device)[self.row_of]

    def values(self, like: Tensor) -> Tensor:
        """(B, n, C) what is put in at the stack; zeros where layers will overwrite."""
        rows = [[piece for share in row for piece in _entering(share, like)] for row in self.rows]
        values = self._of_batch(table(rows, self.length, like), len(like))
        return self._packed(values)

    def deep(self, seat: Seat, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """(B, n, C) what a layer puts in its slots and (B, n) which ones, None when it puts nothing."""
        here = dict(seat.running(Port.SEQUENCE))
        if not any(share.name in here for row in self.rows for share in row):
            return None
        batch = len(hidden)
        made = {name: _even(seat, name, _made(seat, grafts, batch)) for name, grafts in here.items()}
        for row in self.rows:
            for share in row:
                _check_deep(seat, share, made.get(share.name))
        rows = [[piece for share in row for piece in _over(share, made, hidden)] for row in self.rows]
        mask = [[flag for share in row for flag in _flags(share, made)] for row in self.rows]
        full = torch.tensor(
            [flags + [False] * (self.length - len(flags)) for flags in mask], device=hidden.device
        )
        values = self._of_batch(table(rows, self.length, hidden), batch)
        return self._packed(values), self._packed(self._of_batch(full, batch))

    def _packed(self, values: Tensor) -> Tensor:
        """(B, n, ...) with the positions that a sample has in front."""
        if not self.partly:
            return values
        order = self._used(len(values), values.device).logical_not().long().argsort(stable=True, dim=1)
        return values.gather(1, order.view(*order.shape, *(1,) * (values.dim() - 2)).expand_as(values))

    def _used(self, batch: int, device: torch.device) -> Tensor:
        """(B, n) which positions of the table of values a sample has."""
        rows = [[_has(share, batch, device) for share in row] for row in self.rows]
        none = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        made = [torch.cat([none, *row], 1) for row in rows]
        wide = [functional.pad(row, (0, self.length - row.shape[1])) for row in made]
        return self._of_batch(torch.stack(wide), batch, own=True)

    def _of_batch(self, rows: Tensor, batch: int, own: bool = False) -> Tensor:
        """(R, ...), or (R, B, ...) where samples have their `own`, of distinct rows -> (B, ...) of the samples."""
        if own or rows.dim() == 4:
            return self._of_own(rows, batch)
        if self.row_of is None:
            return rows.expand(batch, *rows.shape[1:])
        return rows.index_select(0, self.row_of)

    def _of_own(self, rows: Tensor, batch: int) -> Tensor:
        if rows.shape[1] != batch:
            raise RouteError(f"prompt {self.names} was made for {rows.shape[1]} rows, now there are {batch}")
        if self.row_of is None:
            return rows[0]
        return rows[self.row_of, torch.arange(batch, device=rows.device)]


@dataclass(frozen=True)
class Frame:
    """What one forward of a stack tells its layers, as `state.slots`.

    Attributes:
        slots: what was put in, None when the cache holds it.
        places: (B, S) positions for a table that counts by itself, None where it counts right.
        config: the stack's.
        shift: how far own positions are moved behind a prefix, None where they are not.
        extent: which own positions are real, for hidden modules with a span; None where there are none.
    """

    slots: Slots | None
    places: Tensor | None
    config: Any
    shift: Shift | None = None
    extent: Extent | None = None

    def real(self, x: Tensor) -> Tensor | None:
        """(B, S) which positions of a signal x (B, S, C) of this stack are no filler between rows whose prompts
        differ in length; None: all."""
        layout = None if self.slots is None else self.slots.layout
        return None if layout is None or x.dim() != 3 else layout.real(x.shape[1])


def compose(
    seat: Seat, layers: tuple[Seat, ...], batch: int, device: torch.device, causal: bool
) -> Slots | None:
    """The slots that running prompts of a stack (and of its layers, deep) ask for; None when none runs."""
    state = seat.state
    if not any(one.at(Port.SEQUENCE).get(name) for one in (seat, *layers) for name in state.serving):
        return None
    route, tracing = state.rows, torch.compiler.is_compiling()  # a compiled graph must serve any index
    used = [name for name in state.serving if route is None or tracing or route.uses(name)]
    shares = [share for name in used if (share := _share(seat, layers, name, batch)) is not None]
    if not shares:
        return None
    if route is None:
        return Slots([shares], None, causal)
    if route.per_token:
        raise RouteError(
            f"{seat.path or 'the model'}: positions of a prompt ({', '.join(s.name for s in shares)})"
            " belong to whole rows and cannot be routed per token. Route per sample, by an index (batch,)"
        )
    index = route.fit(batch, None).to(device)
    names = [share.name for share in shares]
    here = [names.index(name) if name in names else len(names) for name in route.names]
    row_of = torch.tensor([*here, len(names)], device=device)[
        index
    ]  # index -1 takes the last entry: no prompt
    empty: list[list[Share]] = [[]] if tracing or route.leaves_out(names) else []
    return Slots([*([share] for share in shares), *empty], row_of, causal)


def _share(seat: Seat, layers: tuple[Seat, ...], name: str, batch: int) -> Share | None:
    shallow = seat.at(Port.SEQUENCE).get(name, ())
    deeper = [layer.at(Port.SEQUENCE).get(name, ()) for layer in layers]
    if not shallow and not any(deeper):
        return None
    deep = 0
    if any(deeper):
        if not deeper[0]:
            raise StateError(
                f"deep prompt {name!r} begins behind the first layer of {seat.path or 'the model'}, where "
                "its slots would already take part. Give it the first layer too (layers='first 2', or 'all')"
            )
        deep = _even(seat, name, _made(seat, deeper[0], batch)).shape[-2]
    entering, used = _made(seat, shallow, batch) if shallow else (None, None)
    modules = [graft.module for grafts in (shallow, *deeper) for graft in grafts]
    front, stays, hinted = (any(getattr(m, asked) for m in modules) for asked in ("front", "stays", "hinted"))
    hints = _hints(seat, name, batch) if hinted else None
    return Share(
        name,
        entering,
        deep,
        deep + (0 if entering is None else entering.shape[-2]),
        front,
        stays,
        None if used is None else functional.pad(used, (0, deep), value=True),
        None if hints is None else hints.position,
        0 if hints is None else hints.furthest,
    )


def _hints(seat: Seat, name: str, batch: int) -> Hints:
    hints = seat.state.hints
    if hints is None:
        raise StateError(
            f"{name!r} writes hints from the query and the passage of each row, and none are set: "
            "with graftwork.hints(model, query=..., passage=...): model(...)"
        )
    return hints.fit(batch)


def _agreed(rows: list[list[Share]]) -> bool:
    """Whether all prompts of a forward stay in the stack's output; they cannot do both."""
    stays = {share.stays for row in rows for share in row}
    if len(stays) > 1:
        names = sorted({repr(share.name) for row in rows for share in row if share.stays})
        raise StateError(
            f"prompt {', '.join(names)} stays in the output and the others do not; run them in calls of their own"
        )
    return stays == {True}


def _placed(row: list[Share]) -> Tensor | None:
    """(B,) where a row's prompt goes; None at the front."""
    places = [share.position for share in row if share.position is not None]
    others = [repr(share.name) for share in row if share.position is None]
    if places and others:
        raise StateError(
            f"hints have a position of their own and prompt {', '.join(others)} goes to the front, so one row cannot "
            "have both; run them one at a time, or set the hints without a position"
        )
    return places[0] if places else None


def _has(share: Share, batch: int, device: torch.device) -> Tensor:
    """(B, length) which positions of a share each sample has."""
    if share.used is not None:
        return share.used
    return torch.ones(batch, share.length, dtype=torch.bool, device=device)


def _is_front(row: list[Share]) -> bool:
    """Whether a row's prompt goes to the very front."""
    front = {share.name for share in row if share.front}
    rest = [repr(share.name) for share in row if share.name not in front]
    if front and rest:
        raise StateError(
            f"prompts {', '.join(map(repr, sorted(front)))} go before the first position and "
            f"{', '.join(rest)} behind it, so one row cannot have both; run them one at a time, or route them"
        )
    return bool(front)


def _made(seat: Seat, grafts: tuple[Graft, ...], batch: int) -> tuple[Tensor, Tensor | None]:
    """Positions (n, C) or (B, n, C) of one adapter, and (B, n) which of them each sample has (None: all)."""
    modules: list[Any] = [graft.module for graft in grafts]
    name = grafts[0].adapter
    made = [module.positions(_hints(seat, name, batch) if module.hinted else None) for module in modules]
    values = [one.values for one in made]
    if all(one.counts is None for one in made):
        return behind_one_another(values, values), None
    used = [
        torch.arange(one.values.shape[-2], device=one.values.device)
        < (one.values.shape[-2] if one.counts is None else one.counts[:, None])
        for one in made
    ]
    return behind_one_another(values, values), torch.cat([each.expand(batch, -1) for each in used], 1)


def _even(seat: Seat, name: str, made: tuple[Tensor, Tensor | None]) -> Tensor:
    """Positions of a deep prompt, of which every sample has all."""
    if made[1] is not None:
        raise StateError(f"{seat.path}: deep prompt {name!r} has different numbers of positions for its rows")
    return made[0]


def _entering(share: Share, like: Tensor) -> list[Tensor]:
    deep = like.new_zeros(share.deep, like.shape[-1])
    if share.shallow is None:
        return [deep]
    if share.shallow.shape[-1] != like.shape[-1]:
        raise StateError(
            f"prompt {share.name!r} is {share.shallow.shape[-1]} wide, the stack reads {like.shape[-1]}; "
            "build it with the width of the stack's embeddings"
        )
    return [share.shallow.to(like.dtype), deep]


def _over(share: Share, made: dict[str, Tensor], like: Tensor) -> list[Tensor]:
    front = like.new_zeros(share.length - share.deep, like.shape[-1])
    return [
        front,
        made[share.name].to(like.dtype) if share.name in made else like.new_zeros(share.deep, like.shape[-1]),
    ]


def _flags(share: Share, made: dict[str, Tensor]) -> list[bool]:
    return [False] * (share.length - share.deep) + [share.name in made] * share.deep


def _check_deep(seat: Seat, share: Share, piece: Tensor | None) -> None:
    if piece is not None and piece.shape[-2] != share.deep:
        raise StateError(
            f"{seat.path}: deep prompt {share.name!r} has {piece.shape[-2]} positions here and {share.deep} at "
            "the first layer; a deep prompt has the same number at every layer"
        )
