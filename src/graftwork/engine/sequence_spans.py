"""Which positions of a call a hidden module with a `span` is for. Found once a forward, for all layers.

B samples, T own positions, P positions in the cache, S = T and slots of prompts among them
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graftwork.engine import sequence_cache as caches
from graftwork.engine.modules import Span
from graftwork.engine.route import Route
from graftwork.engine.sequence_layout import Layout
from graftwork.errors import PortUnavailable, StateError


class Extent:
    """The own positions of one call of a stack.

    Args:
        where: what messages call the stack.
        call: its arguments by name.
        cache: the cache among them.
    """

    def __init__(self, where: str, call: dict[str, Any], cache: Any) -> None:
        self.where = where
        self.mask = call.get("attention_mask")
        self.past = caches.length(cache)
        self._found: dict[tuple[object, ...], tuple[Tensor, Tensor | None]] = {}

    def chosen(
        self, span: Span, route: object, name: str, layout: Layout | None, y: Tensor
    ) -> tuple[Tensor, Tensor | None] | None:
        """(B, S) where a signal y (B, S, C) is changed, and the flat positions that says (None while
        compiling); None for what is decoded with a cache."""
        if y.dim() != 3:
            raise PortUnavailable(
                f"{self.where}: a signal of shape {tuple(y.shape)} has no positions to choose from"
            )
        if self._decodes(y.shape[1]):
            return None
        if torch.compiler.is_compiling():
            return self._mask(span, route, name, layout, y), None
        key = (span, route, name, y.shape[:2])
        if key not in self._found:
            mask = self._mask(span, route, name, layout, y)
            self._found[key] = mask, mask.flatten().nonzero().squeeze(1)
        return self._found[key]

    def _decodes(self, tokens: int) -> bool:
        if torch.compiler.is_compiling() and isinstance(self.past, Tensor):  # on the device: not looked at
            return tokens == 1
        past = int(self.past)
        if past and tokens > 1:
            raise StateError(
                f"{self.where}: {tokens} positions follow {past} in a cache; whether they belong to the prompt, "
                "where a module with a span acts, is not known. Give the prompt in one call"
            )
        return past > 0

    def _mask(self, span: Span, route: object, name: str, layout: Layout | None, y: Tensor) -> Tensor:
        own = y.shape[1] - (0 if layout is None else layout.length)
        real = self._real(len(y), own, y.device)
        if isinstance(route, Route):  # a blend weighs the answers of all its adapters
            mine = route.fit(len(y), own) == route.names.index(name)
            real = real & (mine if mine.dim() == 2 else mine[:, None])
        chosen = _ends(span, real)
        slots = None if layout is None else chosen.new_zeros(len(y), layout.length)
        return chosen if layout is None or slots is None else layout.merge(slots, chosen)

    def _real(self, batch: int, own: int, device: torch.device) -> Tensor:
        """(B, T) which own positions are no padding."""
        mask = self.mask.get("full_attention") if isinstance(self.mask, dict) else self.mask
        if self.mask is None:
            return torch.ones(batch, own, dtype=torch.bool, device=device)
        if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
            raise PortUnavailable(
                f"{self.where}: its mask, a {type(self.mask).__name__}, does not tell padding from text; "
                "give a mask of shape (batch, tokens)"
            )
        rows = mask if mask.dim() == 2 else mask[:, 0, -1, :own]  # the last query of a finished mask sees all
        rows = rows >= 0 if rows.is_floating_point() and mask.dim() == 4 else rows != 0
        if rows.shape[1] != own:
            raise StateError(f"{self.where}: {own} positions have a mask of {rows.shape[1]}")
        return rows.expand(batch, -1)


def _ends(span: Span, real: Tensor) -> Tensor:
    """The first and last of the true positions in each row."""
    if span.first is None and span.last is None:
        return real
    order = real.long().cumsum(1)
    return real & ((order <= (span.first or 0)) | (order[:, -1:] - order < (span.last or 0)))
