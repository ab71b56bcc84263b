"""What layers and position tables do inside a stack with a prompt.

B samples, T own positions, S = n + T, C channels
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graftwork.engine.seat import Seat
from graftwork.engine.sequence_inputs import bound, wide_mask
from graftwork.engine.sequence_slots import Frame, Slots
from graftwork.errors import StateError
from graftwork.reference.properties import Port

Inner = Callable[..., Any]


@dataclass(eq=False)
class AtLayer:
    """What runs in place of a layer's plain call.

    Attributes:
        arguments: names of its forward's parameters, in order.
        stack: seat of the stack it belongs to.
        between: positions enter at the first layer and leave behind the last, where the stack itself cannot.
        first, last: whether it is the first or last layer.
        keep, front, stays, causal: as in the stack's facts.
    """

    arguments: tuple[str, ...]
    stack: Seat
    between: bool
    first: bool
    last: bool
    keep: int
    front: bool
    stays: bool

    def __call__(
        self,
        module: nn.Module,
        seat: Seat,
        base: type,
        inner: Inner,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        frame = seat.state.slots
        if frame is None and _expected(seat):
            raise StateError(
                f"{seat.path} was called outside its stack {self.stack.path!r}, so a prompt has no slots"
            )
        if frame is None or frame.slots is None:
            return inner(module, seat, base, args, kwargs)
        call = bound(self.arguments, args, kwargs)
        name = self.arguments[0]
        call[name] = hidden = self._entering(seat, frame.slots, call[name])
        if self.between and "attention_mask" in self.arguments:
            call["attention_mask"] = _mask(frame, frame.slots, call.get("attention_mask"), hidden)
        out = inner(module, seat, base, (), call)
        if self.between and self.last and not (self.stays or frame.slots.stays):
            return _leaving(out, frame.slots)
        return out

    def _entering(self, seat: Seat, slots: Slots, hidden: Tensor) -> Tensor:
        """The layer's input with what this layer puts into its slots."""
        if self.between and self.first:
            layout = slots.lay_out(None, len(hidden), self.keep, self.front, hidden.device)
            hidden = layout.merge(slots.values(hidden), hidden)
            slots.total = hidden.shape[1]
        if not seat.running(Port.SEQUENCE):
            return hidden
        seat.touch(Port.SEQUENCE)
        deep = slots.deep(seat, hidden)
        return hidden if deep is None else _overwrite(hidden, slots, *deep)


def _expected(seat: Seat) -> bool:
    """Whether a prompt that some row of this batch has is to be written here."""
    route = seat.state.route
    return any(route is None or route.uses(name) for name, _ in seat.running(Port.SEQUENCE))


def _overwrite(hidden: Tensor, slots: Slots, values: Tensor, which: Tensor) -> Tensor:
    assert slots.layout is not None
    where = slots.layout.slots()[..., None].expand_as(values)
    return hidden.scatter(1, where, values.where(which[..., None], hidden.gather(1, where)))


def _leaving(out: Any, slots: Slots) -> Any:
    assert slots.layout is not None
    if isinstance(out, tuple):
        return (slots.layout.take(out[0]), *out[1:])
    return slots.layout.take(out)


def _mask(frame: Frame, slots: Slots, mask: Any, hidden: Tensor) -> Any:
    """The mask of every layer, widened once: at the first one the mask is still that of the own positions."""
    layout = slots.layout
    assert layout is not None
    if mask is not None:
        return wide_mask(mask, layout, hidden.shape[1] - layout.length, slots.causal, True)
    if layout.counts is None:
        return None
    if slots.mask is None:
        from transformers import masking_utils

        make: Any = (
            masking_utils.create_causal_mask if slots.causal else masking_utils.create_bidirectional_mask
        )
        options = {"past_key_values": None} if slots.causal else {}
        rows = wide_mask(None, layout, hidden.shape[1] - layout.length, slots.causal, True)
        slots.mask = make(config=frame.config, inputs_embeds=hidden, attention_mask=rows, **options)
    return slots.mask


@dataclass(eq=False)
class AtTable:
    """What runs in place of a position table that counts by itself: positions (B, S) of rows with slots."""

    def __call__(
        self,
        module: nn.Module,
        seat: Seat,
        base: type,
        inner: Inner,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        frame = seat.state.slots
        if frame is None or frame.places is None:
            return inner(module, seat, base, args, kwargs)
        places = frame.places  # the table takes one row of positions
        out = inner(module, seat, base, (places,), {"position_ids": places.flatten()})
        return out.view(*places.shape, out.shape[-1])
