"""Hidden port: a module reads the signal at a site, and the card's integration joins its answer to it.

Weight 0 of a route is the untouched signal, for every form of integration.

    B samples, T tokens, C channels
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graftwork.engine import assigned, channels
from graftwork.engine.blend import Blend
from graftwork.engine.seat import Graft, Seat
from graftwork.errors import RouteError, StateError
from graftwork.reference.card import Card
from graftwork.reference.properties import Insertion, Integration
from graftwork.reference.site import Side

Running = tuple[tuple[str, tuple[Graft, ...]], ...]


def _add(y: Tensor, z: Tensor, scale: float) -> Tensor:
    return y + z


def _add_scaled(y: Tensor, z: Tensor, scale: float) -> Tensor:
    return torch.add(y, z, alpha=scale)


def _gate(y: Tensor, z: tuple[Tensor, Tensor], scale: float) -> Tensor:
    gate, change = z
    return y + gate * change


def _rescale(y: Tensor, z: Tensor | tuple[Tensor, Tensor], scale: float) -> Tensor:
    if isinstance(z, tuple):
        return y * z[0] + z[1]
    return y * z


INTEGRATIONS: dict[Integration, Callable[[Tensor, Any, float], Tensor]] = {
    Integration.DIRECT_ADDITION: _add,
    Integration.SCALED_ADDITION: _add_scaled,
    Integration.GATED_ADDITION: _gate,
    Integration.RESCALING: _rescale,
}


def integrate(card: Card, y: Tensor, z: Any) -> Tensor:
    """Join a module's answer z to the host's signal y (..., C) as the card says, in the precision of y."""
    return INTEGRATIONS[card.integration](y, z, card.scale)


def signal(args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> Tensor:
    """The hidden signal among a module's arguments: the first one, or the keyword a host uses for it."""
    if args:
        return args[0]
    for name in ("hidden_states", "input", "x", "inputs_embeds", "pixel_values"):
        if name in kwargs:
            return kwargs[name]
    raise StateError(
        f"{path}: no hidden signal among its arguments {sorted(kwargs)}; call it with the signal first"
    )


def before(
    seat: Seat, running: Running, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the modules that change what the host reads applied to the signal."""
    x = signal(args, kwargs, seat.path)
    changed = _through(seat, running, Side.INPUT, x, lambda graft, now: now)
    if changed is x:
        return args, kwargs
    if args:
        return (changed, *args[1:]), kwargs
    return args, {key: changed if value is x else value for key, value in kwargs.items()}


def behind(seat: Seat, running: Running, entered: tuple[tuple[Any, ...], dict[str, Any]], out: Any) -> Any:
    """The host's answer with the modules that change it applied."""
    answer = out[0] if isinstance(out, tuple) else out
    changed = _through(
        seat, running, Side.OUTPUT, answer, lambda graft, now: _read(seat, graft, entered, now)
    )
    return (changed, *out[1:]) if isinstance(out, tuple) else changed


def _through(
    seat: Seat, running: Running, side: Side, y: Tensor, read: Callable[[Graft, Tensor], Tensor]
) -> Tensor:
    """The signal y with the modules of all running adapters at one end applied: one on another, or blended."""
    route = seat.state.route
    if not isinstance(route, Blend):
        return _one_on_another(seat, running, side, y, read)
    each = [(name, _one_on_another(seat, ((name, grafts),), side, y, read)) for name, grafts in running]
    answers = [(name, answer) for name, answer in each if answer is not y]
    return route.mix(y, answers, running[0][1][0].site) if answers else y


def _one_on_another(
    seat: Seat, running: Running, side: Side, y: Tensor, read: Callable[[Graft, Tensor], Tensor]
) -> Tensor:
    for name, grafts in running:
        for graft in grafts:
            if graft.site.side is side:
                y = _apply(seat, name, graft, read(graft, y), y)
    return y


def _read(
    seat: Seat, graft: Graft, entered: tuple[tuple[Any, ...], dict[str, Any]], answer: Tensor
) -> Tensor:
    """What the module reads: the host's answer, its input, or the input of the block that ends here."""
    if graft.card.insertion is Insertion.SEQUENTIAL:
        return answer
    entry = graft.site.entry
    if entry is None or entry == seat.path:
        return signal(*entered, seat.path)
    kept = seat.entries[entry].kept
    if kept is None:
        raise StateError(
            f"{graft.site.key}: the block's first module {entry} was not called before {seat.path}, so there is "
            "nothing a parallel module could read; use insertion='sequential'"
        )
    return kept


def _apply(seat: Seat, name: str, graft: Graft, x: Tensor, y: Tensor) -> Tensor:
    axis = graft.site.channel_axis
    if axis != -1 and y.dim() > 2:
        return _apply(seat, name, _channels_last(graft), x.movedim(axis, -1), y.movedim(axis, -1)).movedim(
            -1, axis
        )
    own = graft.site.channels
    if own is not None:
        same = x is y
        part = channels.take(y, own, -1)
        return channels.put(y, _routed(seat, name, graft, part if same else x, part), own, -1)
    return _routed(seat, name, graft, x, y)


def _channels_last(graft: Graft) -> Graft:
    return replace(graft, site=replace(graft.site, channel_axis=-1))


def _routed(seat: Seat, name: str, graft: Graft, x: Tensor, y: Tensor) -> Tensor:
    route = seat.state.route
    if graft.module.span is not None:
        return _spanned(seat, name, graft, x, y)
    if route is None:
        return _whole(seat, graft, x, y)
    if y.shape[0] == 1 < route.batch:
        wide = route.batch, *(-1,) * (y.dim() - 1)
        x, y = (y.expand(wide),) * 2 if x is y else (x.expand(wide), y.expand(wide))
    if route.per_token and not graft.card.token_wise:
        raise RouteError(
            f"{graft.site.key}: {graft.technique} mixes positions and cannot be routed per token"
        )
    if isinstance(route, Blend):
        return _whole(seat, graft, x, y)
    tokens = y.shape[1] if y.dim() == 3 else None
    if torch.compiler.is_compiling():
        mask = route.fit(y.shape[0], tokens) == route.names.index(name)
        mask = mask.view(*mask.shape, *(1,) * (y.dim() - mask.dim()))
        return torch.where(mask, _joined(seat, graft, x, y), y)
    rows = route.rows(name, y.shape[0], tokens)
    if rows.numel() == 0:
        return y
    return _on_rows(seat, graft, rows, x, y, route.per_token and tokens is not None)


def _spanned(seat: Seat, name: str, graft: Graft, x: Tensor, y: Tensor) -> Tensor:
    """The signal changed at the positions of the module's span."""
    frame = seat.state.slots
    if frame is None or frame.extent is None:
        raise StateError(
            f"{graft.site.key}: {seat.path} was called outside its stack, so the positions {graft.technique} "
            "is for are not known; call the model"
        )
    layout = None if frame.slots is None else frame.slots.layout
    chosen = frame.extent.chosen(graft.module.span, seat.state.route, name, layout, y)
    if chosen is None:
        return y
    mask, rows = chosen
    if rows is None:
        return torch.where(mask.unsqueeze(-1), _joined(seat, graft, x, y), y)
    return _on_rows(seat, graft, rows, x, y, True) if rows.numel() else y


def _on_rows(seat: Seat, graft: Graft, rows: Tensor, x: Tensor, y: Tensor, by_token: bool) -> Tensor:
    """The signal changed at some rows of the batch (or tokens of batch x tokens)."""
    flat_y, flat_x = (y.flatten(0, 1), x.flatten(0, 1)) if by_token else (y, x)
    mine = flat_y.index_select(0, rows)
    read = mine if x is y else flat_x.index_select(0, rows)
    assigned.note(seat.state, graft, read, y.shape[:-1], rows)
    changed = flat_y.index_copy(0, rows, _joined(seat, graft, read, mine, rows).to(y.dtype))
    return changed.view(y.shape) if by_token else changed


def _whole(seat: Seat, graft: Graft, x: Tensor, y: Tensor) -> Tensor:
    """The signal changed everywhere."""
    assigned.note(seat.state, graft, x, y.shape[:-1])
    return _joined(seat, graft, x, y)


def _joined(seat: Seat, graft: Graft, x: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
    """The signal y with the answer of one module to x joined; both hold these `rows` of the batch, or all."""
    if not graft.module.mixes:
        return integrate(graft.card, y, graft.module(x))
    frame = seat.state.slots
    real = None if frame is None else frame.real(x)
    real = real if real is None or rows is None else real.index_select(0, rows)
    return integrate(graft.card, y, graft.module(x, real))
