"""MiSS: one small matrix for all shards of the input (Kang and Yin 2024, arXiv:2409.15371, first named Bone).

The input is cut into groups of `rank` channels, the last padded with zeros; the groups are summed and multiplied by
D (rank, out): delta[:, j] = D[j mod rank]. D starts at zero, so attaching changes no output. The sums are a product
with a frozen matrix of zeros and ones, so backward needs them alone, `rank` numbers per token, and not the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from graftwork.engine.modules import LowRankModule, zeros
from graftwork.engine.seeded import Frozen
from graftwork.errors import BadOption
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class MiSS(Technique):
    """Update each chosen matrix by one small matrix, repeated along the input.

    Args:
        rank: input channels per group; at most the input width.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.LINEAR,
        adaptation=Adaptation.REPARAMETERISATION,
        input=Input.HIDDEN,
        insertion=Insertion.PARALLEL,
        integration=Integration.DIRECT_ADDITION,
        workspaces=("attention.query|attention.qkv|ssm.in|conv|linear", "attention.value?|ssm.out?"),
        linear=True,
        identity_at_init=True,
        formula="y = W x + D^T (x_1 + x_2 + ...), x_g the groups of `rank` channels",
        parameters="rank out per matrix",
        citation="Kang and Yin 2024, MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing "
        "Structure, arXiv:2409.15371",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic({"block": Role.CHANGE})

    rank: Annotated[int, AtLeast(1)] = 64

    def fits(self, site: Site) -> bool:
        return site.multiplies

    def build(self, site: Site) -> nn.Module:
        if self.rank > site.width_in:
            raise BadOption(
                f"{self.name}: rank={self.rank} is above the {site.width_in} input channels of {site.key}; "
                f"take at most {site.width_in}"
            )
        return Shards(site, self.rank)

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        if not sites:
            return None
        groups = -(-max(site.width_in for site in sites) // self.rank)
        return Frozen({"groups": torch.eye(self.rank).repeat(1, groups)}, sites[0].device)


class Shards(LowRankModule):
    def __init__(self, site: Site, rank: int) -> None:
        super().__init__()
        self.block = zeros(*site.batch, rank, site.width_out)
        self.width_in = site.width_in

    def adopt(self, shared: Frozen) -> None:
        self.shared = shared

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.shared["groups"][:, : self.width_in], self.block.mT
