"""What rows of the coming forwards are about: a query and a passage each, for modules that write hints from them.

B samples, M query tokens, N passage tokens, C channels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from graftwork.errors import BadData, PortUnavailable, RouteError

Encoding = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Hints:
    """The texts of each row, and where what is made of them goes.

    Attributes:
        query, passage: (B, M) and (B, N) token numbers.
        query_mask, passage_mask: of the same shapes, true where a token counts.
        position: (B,) real positions in front of the hints, None for none.
        furthest: the largest of them, known without a look at the device.
        embed: the host's embedding: token numbers (...) -> (..., C).
    """

    query: Tensor
    query_mask: Tensor
    passage: Tensor
    passage_mask: Tensor
    position: Tensor | None
    furthest: int
    embed: Any

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the host's embedding."""
        return self.embed.weight.dtype

    def fit(self, batch: int) -> Hints:
        """For a batch that is a multiple of the rows, each row repeated (beams); RouteError for any other."""
        rows = len(self.query)
        if rows == batch:
            return self
        if batch % rows:
            raise RouteError(f"hints are set for {rows} rows, now there are {batch}; set them for each batch")
        tensors = {name: getattr(self, name) for name in (*_TEXTS, "position")}
        times = batch // rows
        return replace(
            self, **{k: t.repeat_interleave(times, 0) for k, t in tensors.items() if t is not None}
        )

    def seen(self, distinct: bool, unasked: bool) -> Tensor:
        """(B, N) which passage tokens to look at.

        Args:
            distinct: the first of equal tokens only.
            unasked: none that occurs in the query; a passage of no others keeps all.
        """
        seen = self.passage_mask
        if unasked:
            asked = (self.passage[..., None] == self.query[:, None]) & self.query_mask[:, None]
            rest = seen & ~asked.any(-1)
            seen = torch.where(rest.any(1, keepdim=True), rest, seen)
        if distinct:
            same = (self.passage[..., None] == self.passage[:, None]) & seen[:, None]
            seen = seen & ~same.tril(-1).any(-1)
        return seen

    def nearest(self, queries: Tensor, passages: Tensor, seen: Tensor, count: int, distinct: bool) -> Tensor:
        """(B, count) the passage tokens nearest to a query token by cosine, nearest first, earlier ones first among
        equals; fewer are repeated in order.

        Args:
            queries, passages: (B, M, C) and (B, N, C) embeddings.
            distinct: a token counts once, with the query token that it is nearest to; else once for each query token.
        """
        cosine = normalize(queries.float(), dim=-1) @ normalize(passages.float(), dim=-1).mT
        shown = self.query_mask[..., None] & seen[:, None]
        cosine = cosine.masked_fill(~shown, -torch.inf)
        pairs = (cosine.amax(1) if distinct else cosine.flatten(1)).sort(stable=True, dim=1, descending=True)
        found = (pairs.values > -torch.inf).sum(1, keepdim=True)
        rank = torch.arange(count, device=cosine.device) % found
        return self.passage.gather(1, pairs.indices.gather(1, rank) % self.passage.shape[1])

    def packed(self, values: Tensor, before: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P + M + S, C) rows of (B, P, C), what query tokens (B, M, C) have, and (B, S, C), those of padding last;
        and (B,) how many each row has."""
        whole = torch.cat([before, values, behind], 1)
        ends = [torch.ones(each.shape[:2], dtype=torch.bool, device=each.device) for each in (before, behind)]
        here = torch.cat([ends[0], self.query_mask, ends[1]], 1)
        order = here.logical_not().long().argsort(stable=True, dim=1)
        return whole.gather(1, order[..., None].expand_as(whole)), here.sum(1)


_TEXTS = ("query", "query_mask", "passage", "passage_mask")


def hints_of(model: nn.Module, query: Encoding, passage: Encoding, position: Tensor | None) -> Hints:
    """Hints checked against one another and the model's table; BadData says what does not fit."""
    table = _table(model)
    device = table.weight.device
    asked, asked_mask = _text(query, "query", table)
    given, given_mask = _text(passage, "passage", table)
    if len(asked) != len(given):
        raise BadData(f"hints: {len(asked)} queries and {len(given)} passages; give each row one of both")
    furthest = 0 if position is None else _furthest(position, len(asked))
    return Hints(
        asked.to(device),
        asked_mask.to(device),
        given.to(device),
        given_mask.to(device),
        None if position is None else position.to(device),
        furthest,
        table,
    )


def _table(model: Any) -> Any:
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        table = None
    if not isinstance(getattr(table, "weight", None), Tensor):
        raise PortUnavailable(
            f"hints: {type(model).__name__} names no table of token embeddings (get_input_embeddings), from which "
            "queries and passages are read"
        )
    return table


def _text(encoding: Encoding, name: str, table: Any) -> tuple[Tensor, Tensor]:
    """Token numbers and mask of an encoding, every row with at least one token."""
    ids = encoding.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise BadData(
            f"hints: {name} needs input_ids (batch, tokens) of whole numbers, as tokenizer(texts, padding=True, "
            f"return_tensors='pt') gives them, not {tuple(ids.shape) if isinstance(ids, Tensor) else type(ids)}"
        )
    mask = encoding.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise BadData(f"hints: {name} has ids of {tuple(ids.shape)} and a mask of {tuple(mask.shape)}")
    empty = (mask != 0).any(1).logical_not().nonzero()
    if len(empty):
        raise BadData(f"hints: {name} {int(empty[0])} has no token")
    low, high, count = int(ids.min()), int(ids.max()), table.weight.shape[0]
    if low < 0 or high >= count:
        raise BadData(f"hints: {name} has token {low if low < 0 else high}, the table has {count}")
    return ids.long(), mask != 0


def _furthest(position: Tensor, rows: int) -> int:
    if position.shape != (rows,) or position.is_floating_point():
        raise BadData(
            f"hints: position is a whole number for each of {rows} rows, not {tuple(position.shape)}"
        )
    if int(position.min()) < 0:
        raise BadData(f"hints: position {int(position.min())} is below 0")
    return int(position.max())
