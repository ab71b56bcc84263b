"""AdaLink: a low-rank link behind the embeddings, in front of an untouched core (Wang et al. 2023, arXiv:2310.12100).

Each embedded token e becomes e + up f(down e). `up` starts at zero, so attaching changes no output. Where a
model reads several modalities, each has a link of its own: one adapter each, at `inputs`, with a route per
token that says which token is text and which image. Behind a table of tokens a link merges exactly, f or not;
behind a projection of image features it merges without f.

The paper names neither f, biases nor the start of the link. None, none and the identity are taken here; the
other forms are options.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from torch import Tensor, nn

from graftwork.engine.modules import HiddenModule, Linear, Span, activation
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import (
    Adaptation,
    Input,
    Insertion,
    Insertions,
    Integration,
    IntraConnectivity,
)
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class AdaLink(Technique, name="adalink"):
    """Pass embedded tokens through a narrow link, once, in front of the first layer.

    Args:
        rank: width of the link.
        nonlinearity: f; "none" makes the link linear.
        bias: whether both projections have one.
        scope: "all" tokens, or those of the "prompt" only: none that is decoded with a cache.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.LINEAR,
        adaptation=Adaptation.ADDITION,
        input=Input.HIDDEN,
        insertion=Insertion.SEQUENTIAL,
        insertions=Insertions.ONE,
        integration=Integration.DIRECT_ADDITION,
        workspaces=("encoder.embedding|embedding|text.embedding",),
        linear=True,
        identity_at_init=True,
        formula="y = e + up f(down e)",
        parameters="2 width rank for each modality",
        citation="Wang et al. 2023, Non-Intrusive Adaptation: Input-Centric Parameter-efficient Fine-Tuning for "
        "Versatile Multimodal Modeling, arXiv:2310.12100",
    )

    rank: Annotated[int, AtLeast(1)] = 64
    nonlinearity: Literal["none", "relu", "gelu", "silu", "tanh"] = "none"
    bias: bool = False
    scope: Literal["all", "prompt"] = "all"

    @property
    def card(self) -> Card:
        card = super().card
        if self.nonlinearity != "none":
            card = replace(card, intra_connectivity=IntraConnectivity.NONLINEAR, linear=False)
        return card if self.scope == "all" else replace(card, linear=False)

    def fits(self, site: Site) -> bool:
        """A part of the tokens can be told where positions are an axis before the channels."""
        return self.scope == "all" or site.channel_axis == -1

    def build(self, site: Site) -> nn.Module:
        link = Link(site.width, self.rank, self.nonlinearity, self.bias)
        link.span = None if self.scope == "all" else Span()
        return link


class Link(HiddenModule):
    def __init__(self, width: int, rank: int, nonlinearity: str, bias: bool) -> None:
        super().__init__()
        self.down = Linear(width, rank, bias=bias)
        self.up = Linear(rank, width, bias=bias)
        self.inner = nn.Identity() if nonlinearity == "none" else activation(nonlinearity)
        nn.init.zeros_(self.up.weight)
        if bias:
            nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.up(self.inner(self.down(h)))
