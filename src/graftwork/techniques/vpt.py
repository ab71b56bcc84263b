"""Visual prompt tuning: trained positions among the patches of an image (Jia et al. 2022, arXiv:2203.12119).

Shallow: [CLS ; prompt ; patches] enters the first layer, and the prompt's positions go through all layers.
Deep: every layer has a prompt of its own, which takes the place of what the layer before answered there. Both
are taken out behind the last layer. A prompt is uniform in +-sqrt(6 / (v + width)), v the values of one patch
(3 x area; `width` where a host reads tokens). It is not the identity: attaching changes the outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.engine.modules import PromptModule
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
from graftwork.reference.technique import AtLeast, Between, Technique

_DEEP = ("vision.layer|encoder.layer|layer",)


@register
@dataclass(frozen=True, kw_only=True)
class VPT(Technique):
    """Put trained positions behind the first one (CLS), once or anew for each layer.

    Args:
        length: number of positions.
        deep: a prompt for each layer; `layers="first 3"` keeps it to some, from the first on.
        dropout: probability of dropping an element of the prompt while training.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.EMBEDDING,
        adaptation=Adaptation.ADDITION,
        input=Input.DATA,
        insertion=Insertion.PARALLEL,
        insertions=Insertions.ONE,
        integration=Integration.CONCATENATION,
        workspaces=("vision.embedding|encoder.embedding|embedding",),
        linear=False,
        identity_at_init=False,
        token_wise=False,
        formula="X' = [CLS ; prompt ; X]; deep: the prompt's positions are replaced in front of each layer",
        parameters="length x width, once; deep: for each layer",
        citation="Jia et al. 2022, Visual Prompt Tuning, arXiv:2203.12119",
    )

    length: Annotated[int, AtLeast(1)] = 10
    deep: bool = False
    dropout: Annotated[float, Between(0, 1)] = 0.1

    @property
    def card(self) -> Card:
        card = super().card
        if not self.deep:
            return card
        return replace(card, workspaces=self.workspaces or _DEEP, insertions=Insertions.ALL_LAYERS)

    def build(self, site: Site) -> nn.Module:
        return VisualPrompt(self.length, site.width, site.patch or site.width, self.dropout)


class VisualPrompt(PromptModule):
    def __init__(self, length: int, width: int, patch: int, dropout: float) -> None:
        super().__init__()
        bound = math.sqrt(6 / (patch + width))
        self.prompt = nn.Parameter(torch.empty(length, width).uniform_(-bound, bound))
        self.dropout = dropout

    def forward(self) -> Tensor:
        return functional.dropout(self.prompt, self.dropout, self.training)
