"""Prompt pool: each sample is given a few prompts of a shared pool (L2P, Wang et al. 2022, arXiv:2112.08654).

The embedded sequence X becomes [P_i1 ; ... ; P_iN ; X] with the N prompts chosen for the sample, each of `length`
positions. Who chooses calls `choose` on the module before the forward (`graftwork.continual.PromptPool` does, by
keys); while nothing is chosen, all prompts are put in, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from graftwork.engine.modules import PromptModule
from graftwork.reference.card import Card, Insertions
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class PromptPool(Technique):
    """Put a few prompts of a shared pool in front of the embedded input.

    Args:
        size: number of prompts.
        length: positions of each.
        init: "symmetric" draws from U(-1, 1), "positive" from U(0, 0.01).
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.EMBEDDING,
        adaptation=Adaptation.ADDITION,
        input=Input.DATA,
        insertion=Insertion.PARALLEL,
        insertions=Insertions.ONE,
        integration=Integration.CONCATENATION,
        workspaces=("encoder.embedding|embedding",),
        linear=False,
        identity_at_init=False,
        token_wise=False,
        formula="X' = [P_i1 ; ... ; P_iN ; X], i chosen for the sample",
        parameters="size x length x embedding width, once",
        citation="Wang et al. 2022, Learning to Prompt for Continual Learning, arXiv:2112.08654",
    )

    size: Annotated[int, AtLeast(1)] = 10
    length: Annotated[int, AtLeast(1)] = 5
    init: Literal["symmetric", "positive"] = "symmetric"

    def build(self, site: Site) -> nn.Module:
        low, high = (-1.0, 1.0) if self.init == "symmetric" else (0.0, 0.01)
        return PooledPrompts(torch.empty(self.size, self.length, site.width).uniform_(low, high))


class PooledPrompts(PromptModule):
    """M prompts (M, length, C), and those that each sample of the next forwards is given."""

    def __init__(self, prompts: Tensor) -> None:
        super().__init__()
        self.prompts = nn.Parameter(prompts)
        self.chosen: Tensor | None = None

    def choose(self, chosen: Tensor | None) -> None:
        """Give sample b the prompts chosen[b] of (B, N), in that order; None gives each sample all."""
        self.chosen = chosen

    def forward(self) -> Tensor:
        return self.prompts.flatten(0, 1) if self.chosen is None else self.prompts[self.chosen].flatten(1, 2)
