"""Prompt tuning: trained positions in front of the input (Lester et al. 2021, arXiv:2104.08691).

The embedded sequence X becomes [prompt ; X]. The prompt starts as normal noise of the embedding table's
spread (std 0.02 where the stack has no table), or as rows of that table drawn at random
(`init="vocabulary"`). It is not the identity: attaching changes the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from graftwork.engine.modules import PromptModule
from graftwork.errors import BadOption
from graftwork.reference.card import Card, Insertions
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class PromptTuning(Technique):
    """Put trained vectors in front of the embedded input.

    Args:
        length: number of positions.
        init: "normal" or "vocabulary" (rows of the embedding table).
        front: before a leading summary position (CLS) too, where it usually stays first.
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
        formula="X' = [prompt ; X]",
        parameters="length x embedding width, once",
        citation="Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, "
        "arXiv:2104.08691",
    )

    length: Annotated[int, AtLeast(1)] = 20
    init: Literal["normal", "vocabulary"] = "normal"
    front: bool = False

    def build(self, site: Site) -> nn.Module:
        module = Prompt(self.length, site.width)
        module.front = self.front
        if site.matrix is None and self.init == "vocabulary":
            raise BadOption(f"{self.name}: {site.key} has no vocabulary to draw from; use init='normal'")
        if site.matrix is not None and not module.prompt.is_meta:
            module.start(site.matrix(), self.init)
        return module


class Prompt(PromptModule):
    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.prompt, std=0.02)

    @torch.no_grad()
    def start(self, table: Tensor, init: str) -> None:
        """Take the spread, or rows, of an embedding table (C, vocabulary)."""
        if init == "normal":
            self.prompt.normal_(std=table.std().item())
        else:
            drawn = torch.randint(table.shape[1], (len(self.prompt),), device=table.device)
            self.prompt.copy_(table[:, drawn].mT)

    def forward(self) -> Tensor:
        return self.prompt
