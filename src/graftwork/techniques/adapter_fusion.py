"""AdapterFusion: attention over the answers of trained adapters (Pfeiffer et al. 2021, arXiv:2005.00247).

Adapters n that are attached to the same site answer the signal h with z_n each; fusion adds sum_n s_n V z_n with
s = softmax over n of (Q h) . (K z_n). V starts as the identity, Q and K at random. Only Q, K and V train: the
adapters stay as they are, need not be active, and stay attached as long as the fusion does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftwork.engine.modules import HiddenModule, Linear
from graftwork.errors import BadOption, CardConflict
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import (
    Adaptation,
    Input,
    Insertion,
    Integration,
    InterConnectivity,
    IntraConnectivity,
)
from graftwork.reference.site import Site
from graftwork.reference.technique import Technique


@register
@dataclass(frozen=True, kw_only=True)
class AdapterFusion(Technique):
    """Add a mixture of what attached adapters answer, weighed anew for each position.

    Args:
        of: names of the attached adapters, bottleneck adapters or others that add to a signal behind a site.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.SELF_ATTENTION,
        inter_connectivity=InterConnectivity.DYNAMIC,
        adaptation=Adaptation.ADDITION,
        input=Input.HIDDEN,
        insertion=Insertion.SEQUENTIAL,
        integration=Integration.DIRECT_ADDITION,
        workspaces=("feedforward|ssm.out|conv|linear",),
        linear=False,
        identity_at_init=False,
        formula="y = h + sum_n softmax_n((Q h) . (K z_n)) V z_n, z_n the answer of adapter n",
        parameters="3 width^2 per site, beside the adapters",
        citation="Pfeiffer et al. 2021, AdapterFusion: Non-Destructive Task Composition for Transfer Learning, "
        "arXiv:2005.00247",
    )
    example: ClassVar[str] = 'of=("nli", "sentiment")'

    of: tuple[str, ...] = ()

    def others(self) -> tuple[str, ...]:
        return self.of

    def build(self, site: Site) -> nn.Module:
        if not self.of:
            raise BadOption(f"{self.name}: of= names no adapter to fuse; give those that are attached")
        return Fusion(site.width)


class Fusion(HiddenModule):
    fused: tuple[tuple[nn.Module, float], ...]

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = Linear(width, width, bias=False)
        self.key = Linear(width, width, bias=False)
        self.value = Linear(width, width, bias=False)
        nn.init.eye_(self.value.weight)

    def meet(self, theirs: Mapping[str, Sequence[Any]]) -> None:
        grafts = [graft for each in theirs.values() for graft in each]
        for graft in grafts:
            card = graft.card
            adds = card.integration in (Integration.DIRECT_ADDITION, Integration.SCALED_ADDITION)
            everywhere = card.token_wise and graft.module.span is None
            if not adds or not everywhere or card.insertion is not Insertion.SEQUENTIAL:
                raise CardConflict(
                    f"adapter-fusion: {graft.technique} of {graft.adapter!r} at {graft.site.key} is not added, "
                    "token by token, behind its site, so its answer cannot be mixed; fuse bottleneck adapters"
                )
        self.__dict__["fused"] = tuple(
            (graft.module, graft.card.scale) for graft in grafts
        )  # no children: theirs

    def forward(self, h: Tensor) -> Tensor:
        answers = torch.stack([scale * module(h) for module, scale in self.fused], dim=-2)
        scores = (self.key(answers) * self.query(h).unsqueeze(-2)).sum(-1)
        return (scores.softmax(-1).unsqueeze(-2) @ self.value(answers)).squeeze(-2)
