"""Q-PEFT: positions written from each row's query and passage (Peng et al. 2024, arXiv:2404.04522).

The embedded sequence becomes [before ; H ; behind] with H = MLP([E'[opening] ; s ; E'[closing]]), and
    retrieval  s = E'[the k passage tokens that are nearest, by cosine, to a query token: E'[q] against E[d]]
    attention  s = MHA(E'[q], E[d], E[d]), one for each query token
E is the host's embedding, E' the same or a trained copy. `graftwork.hints` gives queries, passages and the place.
It is not the identity: attaching changes the outputs. No gradient flows through the choice of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import nn

from graftwork.engine.modules import CrossAttention, HintModule, Hints, Positions
from graftwork.errors import BadOption, PortUnavailable
from graftwork.initialisers.rows import text_ids
from graftwork.reference.card import Card, Insertions
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Between, Technique


@register
@dataclass(frozen=True, kw_only=True)
class QueryPrompt(Technique):
    """Put in positions that depend on the query and the passage of each row.

    Args:
        form: how s is made.
        length: k of the retrieval form; fewer tokens than that are repeated in order (published: drawn at random).
        depth: of the MLP: depth + 1 linear layers of the embedding's width; 0 is none.
        embedding: E' is the host's own ("shared") or a trained "copy", as in the published runs: a whole vocabulary.
        distinct: leave out a passage's repeated tokens.
        unasked: leave out those that occur in the query, unless none is left.
        heads, dropout: of the attention form.
        opening, closing, opening_ids, closing_ids: words around s (published: "hints: " and a newline); their tokens.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.NONLINEAR,
        adaptation=Adaptation.ADDITION,
        input=Input.DATA,
        insertion=Insertion.PARALLEL,
        insertions=Insertions.ONE,
        integration=Integration.CONCATENATION,
        workspaces=("encoder.embedding|embedding",),
        linear=False,
        identity_at_init=False,
        token_wise=False,
        formula="X' = [before ; MLP(E'[top-k tokens]) ; behind], or MLP(MHA(E'[q], E[d], E[d]))",
        parameters="(depth + 1) (D^2 + D); attention 4 D^2 + 4 D more; copy V D more",
        citation="Peng et al. 2024, Q-PEFT, arXiv:2404.04522",
    )

    form: Literal["retrieval", "attention"] = "retrieval"
    length: Annotated[int, AtLeast(1)] = 15
    depth: Annotated[int, AtLeast(0)] = 1
    embedding: Literal["shared", "copy"] = "shared"
    distinct: bool = True
    unasked: bool = False
    heads: Annotated[int, AtLeast(1)] = 2
    dropout: Annotated[float, Between(0, 1)] = 0.1
    opening: str = ""
    closing: str = ""
    opening_ids: tuple[int, ...] = ()
    closing_ids: tuple[int, ...] = ()

    def tokenized(self, encode: Callable[[str], Sequence[int]]) -> QueryPrompt:
        opening = text_ids(encode, self.opening, self.opening_ids)
        closing = text_ids(encode, self.closing, self.closing_ids)
        return replace(self, opening_ids=opening, closing_ids=closing)

    def build(self, site: Site) -> nn.Module:
        for text, ids in ((self.opening, self.opening_ids), (self.closing, self.closing_ids)):
            if text and not ids:
                raise BadOption(
                    f"{self.name}: {text!r} has no ids; attach technique.tokenized(tokenizer.encode)"
                )
        if site.matrix is None:
            raise PortUnavailable(
                f"{self.name}: {site.key} has no vocabulary to read queries and passages with"
            )
        if (self.form, self.depth, self.embedding) == ("retrieval", 0, "shared"):
            raise BadOption(f"{self.name}: depth=0 with a shared embedding leaves nothing to train")
        if self.form == "attention" and site.width % self.heads:
            raise BadOption(f"{self.name}: width {site.width} is no multiple of heads={self.heads}")
        table = site.matrix().mT if self.embedding == "copy" else None
        words = (self.opening_ids, self.closing_ids)
        if self.form == "retrieval":
            return Retrieved(site.width, self.depth, table, words, self.distinct, self.unasked, self.length)
        module = Attended(site.width, self.depth, table, words, self.distinct, self.unasked)
        module.attention = CrossAttention(site.width, self.heads, self.dropout)
        return module


class Retrieved(HintModule):
    def forward(self, hints: Hints) -> Positions:
        with torch.no_grad():
            asked, given = self.rows(hints.query, hints), hints.embed(hints.passage)
            chosen = hints.nearest(asked, given, self.seen(hints), self.count, self.distinct)
        before, behind = (ids.expand(len(chosen), -1) for ids in (self.opening, self.closing))
        return Positions(self.mlp(self.rows(torch.cat([before, chosen, behind], 1), hints)))


class Attended(HintModule):
    attention: CrossAttention

    def forward(self, hints: Hints) -> Positions:
        mixed = self.attention(self.rows(hints.query, hints), hints.embed(hints.passage), self.seen(hints))
        words = (self.rows(ids, hints).expand(len(mixed), -1, -1) for ids in (self.opening, self.closing))
        values, counts = hints.packed(mixed, *words)
        return Positions(self.mlp(values), counts)
