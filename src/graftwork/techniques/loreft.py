"""LoReFT: edit hidden states in a low-rank subspace, at a few positions (Wu et al. 2024, arXiv:2404.03592).

At the first and last positions of each text, behind each chosen layer, h becomes h + R^T (W h + b - R h): in the
subspace of the rows of R, what was there is replaced by W h + b. The rows of R are orthonormal at any moment:
they are what Gram-Schmidt makes of the trained matrix. NoReFT leaves them free, DiReFT also leaves R h where it
is. It is not the identity: attaching changes the outputs.

Positions are counted without padding, among those routed to the adapter, in the call that a cache begins with;
decoded tokens are left alone. Where an answer stands behind the prompt (in training, or decoding without a
cache), `last` means the end of the prompt only if a route per token leaves the answer out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.engine.modules import HiddenModule, Linear, Span
from graftwork.errors import BadOption
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Between, Technique


@register
@dataclass(frozen=True, kw_only=True)
class LoReFT(Technique):
    """Replace hidden states within a low-rank subspace at the first and last positions.

    Args:
        rank: dimensions of the subspace.
        first: positions at the beginning of each text.
        last: positions at its end.
        dropout: probability of dropping an element of the change while training.
        orthogonal: whether the rows of R are orthonormal.
        subtract: whether R h is taken out.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.LINEAR,
        adaptation=Adaptation.ADDITION,
        input=Input.HIDDEN,
        insertion=Insertion.SEQUENTIAL,
        integration=Integration.DIRECT_ADDITION,
        workspaces=("layer",),
        linear=False,
        identity_at_init=False,
        formula="y = h + R^T (W h + b - R h) at the first and last positions, R R^T = I",
        parameters="rank (2 width + 1) per layer",
        citation="Wu et al. 2024, ReFT: Representation Finetuning for Language Models, arXiv:2404.03592",
    )

    rank: Annotated[int, AtLeast(1)] = 1
    first: Annotated[int, AtLeast(0)] = 3
    last: Annotated[int, AtLeast(0)] = 0
    dropout: Annotated[float, Between(0, 1)] = 0.05
    orthogonal: bool = True
    subtract: bool = True

    @classmethod
    def noreft(cls, rank: int = 1, first: int = 3, last: int = 0) -> LoReFT:
        """R is any matrix."""
        return cls(rank=rank, first=first, last=last, orthogonal=False)

    @classmethod
    def direft(cls, rank: int = 1, first: int = 3, last: int = 0) -> LoReFT:
        """R is any matrix, and the host's own part in its rows stays."""
        return cls(rank=rank, first=first, last=last, orthogonal=False, subtract=False)

    def fits(self, site: Site) -> bool:
        """Positions are an axis before the channels, and the subspace is not wider than the signal."""
        return site.channel_axis == -1 and self.rank <= site.width

    def build(self, site: Site) -> nn.Module:
        if self.first == self.last == 0:
            raise BadOption(f"{self.name}: first=0 and last=0 leave no position to edit")
        return Edit(site.width, self)


class Edit(HiddenModule):
    def __init__(self, width: int, chosen: LoReFT) -> None:
        super().__init__()
        self.rotation = nn.Parameter(torch.empty(chosen.rank, width))
        nn.init.orthogonal_(self.rotation)
        self.source = Linear(width, chosen.rank)
        self.orthogonal, self.subtract, self.dropout = chosen.orthogonal, chosen.subtract, chosen.dropout
        self.span = Span(chosen.first, chosen.last)

    def rows(self) -> Tensor:
        """R (rank, width)."""
        if not self.orthogonal:
            return self.rotation
        matrix = self.rotation.mT
        columns, triangle = torch.linalg.qr(matrix.float() if matrix.element_size() < 4 else matrix)
        return (columns * triangle.diagonal().sign()).mT

    def forward(self, h: Tensor) -> Tensor:
        rows = self.rows()
        inward = self.source.weight - rows if self.subtract else self.source.weight
        edit = functional.linear(h, inward.to(h.dtype), self.source.bias.to(h.dtype)) @ rows.to(h.dtype)
        return functional.dropout(edit, self.dropout, self.training)
