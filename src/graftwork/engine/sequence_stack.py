"""The stack's own call with a prompt: what goes in, the cache, what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.engine import sequence_cache as caches
from graftwork.engine import sequence_inputs as inputs
from graftwork.engine import sequence_outputs as outputs
from graftwork.engine.seat import Seat
from graftwork.engine.sequence_facts import Facts
from graftwork.engine.sequence_inputs import Call
from graftwork.engine.sequence_layout import Layout
from graftwork.engine.sequence_shift import Shift, shift_of
from graftwork.engine.sequence_slots import Frame, Slots, compose
from graftwork.engine.sequence_spans import Extent
from graftwork.errors import PortUnavailable, StateError
from graftwork.reference.properties import Port


@dataclass(eq=False)
class AtStack:
    """What runs in place of a stack's plain call.

    Attributes:
        facts: of the stack.
        layers: seats of its layers, in order.
        encoder: seat of the encoder whose prompts stay in what this decoder reads, if any.
        prefixes: seats of attention modules with prefixes that positions are to follow.
        counted: seats of hidden modules that are for some positions only.
        bias: path below the stack of the attention that computes a relative bias for all, "" without one.
    """

    facts: Facts
    layers: tuple[Seat, ...] = ()
    encoder: Seat | None = None
    prefixes: tuple[Seat, ...] = ()
    bias: str = ""
    counted: tuple[Seat, ...] = ()

    def __call__(
        self,
        module: nn.Module,
        seat: Seat,
        base: type,
        inner: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Call,
    ) -> Any:
        call = inputs.bound(self.facts.arguments, args, kwargs)
        if not self.counted:
            return self._call(module, seat, base, inner, call, None)
        extent = Extent(self.facts.where, call, call.get(self.facts.cache))
        before, seat.state.slots = seat.state.slots, Frame(None, None, None, extent=extent)
        try:
            return self._call(module, seat, base, inner, call, extent)
        finally:
            seat.state.slots = before

    def _call(
        self,
        module: nn.Module,
        seat: Seat,
        base: type,
        inner: Callable[..., Any],
        call: Call,
        extent: Extent | None,
    ) -> Any:
        if self.encoder is not None:
            call = self._with_encoder(call, self.encoder)
        cache = call.get(self.facts.cache)
        shift = self._shift(module, call, cache) if self.prefixes else None
        if shift is not None:
            call = inputs.shifted(self.facts, call, shift.by, shift.longest, cache)
        run = _Run(module, seat, base, inner, self.facts, shift, extent)
        stored = caches.layout_of(cache)
        if stored is not None:
            seat.touch(Port.SEQUENCE)
            return run.continued(call, cache, stored)
        batch, device = _batch(call)
        slots = compose(seat, self.layers, batch, device, self.facts.causal)
        if slots is None or not slots.length:
            return run.plain(call, cache) if shift is not None else inner(module, seat, base, (), call)
        seat.touch(Port.SEQUENCE)
        return run.between(call, slots) if self.facts.between else run.entered(call, cache, slots)

    def _shift(self, module: nn.Module, call: Call, cache: Any) -> Shift | None:
        batch, device = _batch(call)
        return shift_of(
            self.prefixes, batch, device, module.get_submodule(self.bias) if self.bias else None, cache
        )

    def _with_encoder(self, call: Call, encoder: Seat) -> Call:
        """The mask over an encoder's output with columns for the prompts that stayed in it."""
        hidden, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        around = encoder.around
        if hidden is None or not isinstance(around, AtStack):
            return call
        slots = compose(encoder, around.layers, len(hidden), hidden.device, around.facts.causal)
        if slots is None:
            return call
        own = hidden.shape[1] - slots.length
        if mask is not None and mask.shape[-1] != own:
            raise StateError(
                f"{self.facts.where}: the encoder's output has {hidden.shape[1]} positions, its mask "
                f"{mask.shape[-1]} and the running prompt {slots.names} {slots.length}: it "
                "was encoded under another prompt. Run both under the same active adapters and route"
            )
        padding = mask if mask is not None and mask.dim() == 2 else None
        layout = slots.lay_out(padding, len(hidden), around.facts.keep, around.facts.front, hidden.device)
        wide = inputs.wide_mask(mask, layout, own, False, False)
        if wide is not None and "encoder_attention_mask" not in self.facts.arguments:
            raise PortUnavailable(
                f"{self.facts.where} takes no mask over the encoder's output, so prompts of different "
                "lengths cannot share a batch; route adapters of one length"
            )
        return call if wide is None else {**call, "encoder_attention_mask": wide}


@dataclass(frozen=True)
class _Run:
    """One call of a stack."""

    module: nn.Module
    seat: Seat
    base: type
    inner: Callable[..., Any]
    facts: Facts
    shift: Shift | None
    extent: Extent | None

    def entered(self, call: Call, cache: Any, slots: Slots) -> Any:
        """A call that puts the prompt in, and out again."""
        if cache is not None and caches.filled(cache):
            raise StateError(
                f"{self.facts.where}: this cache was filled without prompt {slots.names}; "
                "start with an empty cache"
            )
        inputs.check_reach(self.facts, call, slots)
        changed = inputs.entering(self.module, self.facts, call, slots)
        layout = slots.layout
        assert layout is not None
        cache = self._keeper(call, cache, layout, slots)
        if cache is not None:
            changed[self.facts.cache] = cache
        out = self._run(changed, cache, slots)
        self._keep_layout(out, cache, layout, slots)
        if not (self.facts.stays or slots.stays):
            out = outputs.stripped(out, layout, changed["inputs_embeds"].shape[1])
        return _as_asked(self.module, call, out)

    def continued(self, call: Call, cache: Any, layout: Layout) -> Any:
        """A call whose cache holds the prompt."""
        changed = inputs.continuing(self.facts, call, layout, cache)
        batch, _ = inputs.extent(call)
        out = self._run(changed, cache, None)
        return _as_asked(self.module, call, outputs.stripped_maps(out, layout.repeated(batch, "the prompt")))

    def between(self, call: Call, slots: Slots) -> Any:
        """A call whose layers put the prompt in and take it out; what was recorded on the way has slots."""
        out = self._run(call, None, slots)
        layout = slots.layout
        if layout is None:
            raise StateError(
                f"{self.facts.where} never ran its first layer, so prompt {slots.names} was not put in"
            )
        if not (self.facts.stays or slots.stays):
            out = outputs.stripped(out, layout, slots.total)
        return _as_asked(self.module, call, out)

    def plain(self, call: Call, cache: Any) -> Any:
        """A call without a prompt, moved behind a prefix."""
        return self._framed(call, cache, None)

    def _run(self, call: Call, cache: Any, slots: Slots | None) -> Any:
        return self._framed({**call, "return_dict": True}, cache, slots)

    def _framed(self, call: Call, cache: Any, slots: Slots | None) -> Any:
        state, places = self.seat.state, None
        if self.facts.table and call.get("position_ids") is not None:
            call = dict(call)
            places = call.pop("position_ids")
        frame = Frame(slots, places, getattr(self.module, "config", None), self.shift, self.extent)
        before, state.slots = state.slots, frame
        counting = caches.enter(cache)
        try:
            return self.inner(self.module, self.seat, self.base, (), call)
        finally:
            caches.leave(cache, counting)
            state.slots = before

    def _keeper(self, call: Call, cache: Any, layout: Layout, slots: Slots) -> Any:
        """The cache that will hold the slots: the one given, or the one the stack would make for itself."""
        if cache is not None:
            caches.adopt(cache, layout, slots.names)
            return cache
        config = getattr(self.module, "config", None)
        asked = call.get("use_cache")
        wanted = getattr(config, "use_cache", False) if asked is None else asked
        recomputes = self.module.training and getattr(self.module, "gradient_checkpointing", False)
        alone = not getattr(config, "is_encoder_decoder", False) and call.get("encoder_hidden_states") is None
        if wanted and self.facts.causal and self.facts.cache and alone and not recomputes:
            return caches.new(config, layout)
        return None

    def _keep_layout(self, out: Any, cache: Any, layout: Layout, slots: Slots) -> None:
        """A cache that the stack made for itself holds the slots as well."""
        made = out.get(self.facts.cache) if self.facts.cache else None
        if made is not None and cache is None and caches.layout_of(made) is None:
            caches.adopt(made, layout, slots.names)


def _batch(call: Call) -> tuple[int, torch.device]:
    named = (call.get(name) for name in ("input_ids", "inputs_embeds", "pixel_values", "input_features"))
    tensors = (value for value in (*named, *call.values()) if isinstance(value, Tensor))
    first = next(tensors, None)
    if first is None:
        raise StateError(f"a stack with a prompt was called without any tensor: {sorted(call)}")
    return int(first.shape[0]), first.device


def _as_asked(module: nn.Module, call: Call, out: Any) -> Any:
    """A tuple where the caller, or the config, wants one."""
    asked = call.get("return_dict")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "return_dict", True)
    return out if asked else out.to_tuple()
