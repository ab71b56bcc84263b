"""What a stack is given, with slots among its positions.

B samples, T own positions of this call, P own positions in the cache, n slots, C channels
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.engine import sequence_cache as caches
from graftwork.engine.sequence_facts import Facts
from graftwork.engine.sequence_layout import Layout
from graftwork.engine.sequence_slots import Slots
from graftwork.errors import PortUnavailable, StateError

Call = dict[str, Any]
_OTHER_CACHES = ("state", "mems", "past_buckets_states")
_KNOWN = {"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"}


def bound(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Call) -> Call:
    """All arguments by name; a head may hand them over either way."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def extent(call: Call) -> tuple[int, int]:
    """(B, T) of a call."""
    ids = call.get("input_ids")
    given = ids if ids is not None else call.get("inputs_embeds")
    if given is None:
        raise StateError("a stack with a prompt needs input_ids or inputs_embeds")
    return int(given.shape[0]), int(given.shape[1])


def padding_mask(call: Call) -> Tensor | None:
    """The (B, P + T) padding mask among the arguments, None without one or where it is a finished 4D mask."""
    mask = call.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _seen_by_the_last(call: Call, tokens: int) -> Tensor | None:
    """(B, T) which positions the last one sees in a finished mask: those that are no padding."""
    mask = call.get("attention_mask")
    mask = mask.get("full_attention") if isinstance(mask, dict) else mask
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    row = mask[:, 0, -1, :tokens]
    return row >= 0 if row.is_floating_point() else row != 0


def entering(module: nn.Module, facts: Facts, call: Call, slots: Slots) -> Call:
    """A call with the prompt put in; lays the slots out."""
    _refuse_unknown(facts, call, slots)
    embeds = call.get("inputs_embeds")
    if embeds is None:
        embeds = module.get_input_embeddings()(call["input_ids"])  # type: ignore[operator]
    mask = padding_mask(call)
    if mask is None and slots.placed:
        mask = _seen_by_the_last(call, embeds.shape[1])
    layout = slots.lay_out(mask, len(embeds), facts.keep, facts.front, embeds.device)
    out = {**call, "input_ids": None, "inputs_embeds": layout.merge(slots.values(embeds), embeds)}
    out["attention_mask"] = wide_mask(call.get("attention_mask"), layout, embeds.shape[1], facts.causal, True)
    types = call.get("token_type_ids")
    if types is not None:
        out["token_type_ids"] = layout.merge(
            types.new_zeros(len(embeds), layout.length), types.expand(len(embeds), -1)
        )
    return _with_positions(facts, call, out, layout, 0, embeds.shape[1], prefill=True)


def continuing(facts: Facts, call: Call, layout: Layout, cache: Any) -> Call:
    """A call whose cache holds the slots: nothing is put in, masks and positions make room for them."""
    batch, tokens = extent(call)
    layout = layout.repeated(batch, "the prompt in this cache")
    if facts.cache == "cache_params":  # state-space: the state has gone past the padding
        return call
    past = caches.length(cache)
    out = dict(call)
    if call.get("attention_mask") is not None or layout.counts is not None:
        total = _whole(cache, past, tokens)
        out["attention_mask"] = wide_mask(call.get("attention_mask"), layout, total, facts.causal, False)
    return _with_positions(facts, call, out, layout, past, tokens, prefill=False)


def _whole(cache: Any, past: Any, tokens: int) -> int:
    """P + T, or what a static cache can hold: its length is on the device."""
    return past + tokens if isinstance(past, int) else caches.own(cache).get_max_length()


def wide_mask(mask: Any, layout: Layout, total: int, causal: bool, prefill: bool) -> Any:
    """A mask with the slots' columns (and rows, where they are queries too)."""
    if isinstance(mask, dict):
        return {kind: wide_mask(value, layout, total, causal, prefill) for kind, value in mask.items()}
    if mask is None:
        if layout.counts is None:
            return None
        mask = torch.ones(len(layout.start), total, dtype=torch.long, device=layout.start.device)
    if not isinstance(mask, Tensor):
        raise PortUnavailable(
            f"a prompt cannot be put into a {type(mask).__name__}; use model.set_attn_implementation('sdpa')"
        )
    if mask.dim() == 2:
        return layout.merge(layout.used().to(mask.dtype), mask)
    return _wide_square(mask, layout, causal, prefill)


def _wide_square(mask: Tensor, layout: Layout, causal: bool, prefill: bool) -> Tensor:
    """(B, H or 1, Q or 1, K) with n more columns and, where Q are all positions of a prefill, n more rows."""
    mask = mask.expand(len(layout.start), *mask.shape[1:])
    square = prefill and mask.shape[2] > 1
    seeing = layout.used()[:, None].expand(-1, mask.shape[2], -1)
    if (
        causal and square
    ):  # what stands in front of the prompt does not see it; padding may, as it sees nothing else
        itself = mask[:, 0].diagonal(dim1=1, dim2=2)
        padding = itself < 0 if mask.is_floating_point() else itself == 0
        behind = torch.arange(mask.shape[2], device=mask.device)[:, None] >= _behind(layout)
        seeing = seeing & (behind | padding[..., None])
    wide = _columns(mask, _as(mask, seeing)[:, None].expand(*mask.shape[:-1], -1), layout)
    if not square:
        return wide
    shown = layout.used()[:, None].expand(-1, layout.length, -1)
    if causal:
        shown = shown & torch.ones(layout.length, layout.length, dtype=torch.bool, device=mask.device).tril()
        seen = _in_front(mask, layout)
    else:
        seen = mask.amax(2, keepdim=True) if mask.is_floating_point() else mask.any(2, keepdim=True)
    seen = seen.expand(-1, -1, layout.length, -1)
    rows = _columns(seen, _as(mask, shown)[:, None].expand(*seen.shape[:-1], -1), layout)
    return layout.merge(rows.movedim(2, 1), wide.movedim(2, 1)).movedim(1, 2)


def _in_front(mask: Tensor, layout: Layout) -> Tensor:
    """(B, H or 1, 1, K) what a prompt sees of the row: what its first own position sees, in front of the prompt."""
    first = (
        layout.start.clamp(max=mask.shape[2] - 1)
        .view(-1, 1, 1, 1)
        .expand(-1, mask.shape[1], 1, mask.shape[3])
    )
    before = torch.arange(mask.shape[3], device=mask.device) < _behind(layout)[:, None]
    return torch.where(before, mask.gather(2, first), _as(mask, torch.zeros_like(before)))


def _behind(layout: Layout) -> Tensor:
    return layout.start[:, None, None]


def _columns(own: Tensor, slots: Tensor, layout: Layout) -> Tensor:
    return layout.merge(slots.movedim(3, 1), own.movedim(3, 1)).movedim(1, 3)


def _as(mask: Tensor, shown: Tensor) -> Tensor:
    """True and false in the way `mask` says it: bool or integer, or added to the scores."""
    if not mask.is_floating_point():
        return shown.to(mask.dtype)
    return mask.new_zeros(shown.shape).masked_fill(~shown, torch.finfo(mask.dtype).min)


def _with_positions(
    facts: Facts, call: Call, out: Call, layout: Layout, past: Any, tokens: int, prefill: bool
) -> Call:
    places = positions(facts, call, layout, past, tokens, prefill)
    _check_room(facts, "prompt", layout.length, past, tokens, places)
    return out if places is None else {**out, "position_ids": places}


def shifted(facts: Facts, call: Call, shift: Tensor, longest: int, cache: Any) -> Call:
    """A call whose positions are moved by `shift` (B,), at most `longest`, to follow a counted prefix."""
    if not facts.positions and not facts.table:
        return call
    past, (_, tokens) = caches.length(cache), extent(call)
    given = call.get("position_ids")
    base = _base(facts, call, shift.device, past, tokens) if given is None else given
    places = base + shift[:, None]
    _check_room(facts, "prefix", longest, past, tokens, places)
    return {**call, "position_ids": places}


def positions(
    facts: Facts, call: Call, layout: Layout, past: Any, tokens: int, prefill: bool
) -> Tensor | None:
    """(B, n + T) at prefill, else (B, T): a row's own positions as they were, behind its prompt moved by the
    prompt's length; the prompt counts up from where its first own position would be. None when counting
    memory says the same."""
    if not facts.positions and not facts.table:
        return None
    given = call.get("position_ids")
    plain = given is None and padding_mask(call) is None and layout.counts is None
    if plain and facts.positions != "ids":
        return None
    base = _base(facts, call, layout.start.device, past, tokens) if given is None else given
    if base.dim() != 2:
        raise PortUnavailable(
            f"{facts.where}: position_ids of shape {tuple(base.shape)}: a prompt needs (batch, tokens)"
        )
    base = base.expand(len(layout.start), -1)
    if not prefill:
        return base + layout.lengths[:, None]
    order = torch.arange(tokens, device=base.device)
    moved = base + torch.where(order < layout.start[:, None], 0, layout.lengths[:, None])
    start = layout.start[:, None]
    first = base.gather(1, start.clamp(max=tokens - 1)) + (start >= tokens)
    slots = torch.where(layout.used(), first + torch.arange(layout.length, device=base.device), 0)
    return layout.merge(slots, moved)


def _base(facts: Facts, call: Call, device: torch.device, past: Any, tokens: int) -> Tensor:
    """(B or 1, T) positions as the family counts them where none are given."""
    mask, ids = padding_mask(call), call.get("input_ids")
    if facts.positions == "mask" and mask is not None:
        return ((mask.cumsum(1) * mask) - 1).long()[:, -tokens:]
    if facts.positions == "ids" and ids is not None:
        real = ids.ne(facts.padding).long()
        return (real.cumsum(1) + past) * real + facts.padding
    start = facts.padding + 1 if facts.positions == "ids" else past
    return (torch.arange(tokens, device=device) + start)[None]


def _check_room(facts: Facts, what: str, extra: int, past: Any, tokens: int, places: Tensor | None) -> None:
    """Refuse rows that outgrow a learned position table; the device is asked only where they may."""
    if not facts.rows or not isinstance(past, int) or extra + past + tokens <= facts.rows:
        return
    if torch.compiler.is_compiling():
        return
    if places is not None:
        last = int(places.max()) - (facts.padding if facts.positions == "ids" else -1)
        if last <= facts.rows:
            return
    raise StateError(
        f"{what} {extra} + sequence {past + tokens} exceeds the {facts.rows} learned positions of "
        f"{facts.where}; shorten either"
    )


def check_reach(facts: Facts, call: Call, slots: Slots) -> None:
    """Refuse hints behind the end of a text; warn of a text whose end no layer can look back from to the prompt."""
    length = extent(call)[1]
    if slots.furthest > length:
        raise StateError(
            f"{facts.where}: hints go behind position {slots.furthest}, rows have {length} positions; position "
            "counts the real tokens in front of the hints"
        )
    if 0 < facts.reach < length and not torch.compiler.is_compiling():
        warnings.warn(
            f"{facts.where}: every layer looks back through a sliding window, {facts.reach} positions "
            f"together, so the end of a text of {length} does not see prompt {slots.names}; a prefix (prefix "
            "tuning) stays in view",
            stacklevel=2,
        )


def _refuse_unknown(facts: Facts, call: Call, slots: Slots) -> None:
    _refuse_packed(facts, call)
    for name in _OTHER_CACHES:
        if call.get(name) is not None:
            raise PortUnavailable(
                f"{facts.where}: a prompt cannot be kept in {name!r}; generate with use_cache=False"
            )
    extents = extent(call)
    for name, value in call.items():
        strange = name not in _KNOWN and not name.startswith("encoder_") and isinstance(value, Tensor)
        if strange and extents[1] > 1 and tuple(value.shape[:2]) == extents:
            raise PortUnavailable(
                f"{facts.where}: prompt {slots.names} does not know what {name!r} {tuple(value.shape)} "
                "should be at its own positions; use the attention port (prefix tuning)"
            )


def _refuse_packed(facts: Facts, call: Call) -> None:
    places, mask = call.get("position_ids"), call.get("attention_mask")
    packed = any(call.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    if not packed and places is not None and mask is None and not torch.compiler.is_compiling():
        packed = places.dim() == 2 and bool((places.diff(dim=-1) != 1).any())
    if packed:
        raise StateError(
            f"{facts.where}: packed sequences (position_ids restart): a prompt would reach the first "
            "document only. Pad them into rows, or use the attention port (prefix tuning)"
        )
