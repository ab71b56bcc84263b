"""LoRA: a low-rank update beside a frozen matrix (Hu et al. 2021, arXiv:2106.09685).

The host answers W x; LoRA adds s B A drop(x) with s = alpha / rank, or alpha / sqrt(rank) when
rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732). B (`up`) starts at zero, so attaching changes no
output; A (`down`) is Kaiming-uniform with a = sqrt 5, that is uniform in +-1/sqrt(in). For an embedding the
roles swap: A starts at zero and B is normal. `up_rate` multiplies the learning rate of B (LoRA+, Hayou et al.
2024, arXiv:2402.12354; they suggest about 16).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from graftwork.engine.modules import LowRankModule
from graftwork.initialisers import INITIALISERS
from graftwork.initialisers.ranked import Ranked
from graftwork.initialisers.start import register_taken
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import Above, Between

Init = Literal["kaiming", "gaussian", "pissa", "olora", "kasa", "eva", "lora-ga", "loftq", "given"]


@register
@dataclass(frozen=True, kw_only=True)
class LoRA(Ranked):
    """Update each chosen matrix by a product of two thin ones.

    Args:
        rank: inner width of the product.
        alpha: numerator of the scale; None means `rank` (scale 1).
        stabilised: scale by alpha / sqrt(rank).
        dropout: probability of dropping an element of the adapter's input while training.
        up_rate: learning-rate factor of B (LoRA+).
        init: where A and B start, see docs/initialisation.md; "given": to be filled from a file.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.LINEAR,
        adaptation=Adaptation.REPARAMETERISATION,
        input=Input.HIDDEN,
        insertion=Insertion.PARALLEL,
        integration=Integration.SCALED_ADDITION,
        workspaces=(
            "attention.query|attention.qkv|ssm.in|conv|linear",
            "attention.value?|ssm.out?",
        ),
        linear=True,
        identity_at_init=True,
        formula="y = W x + (alpha / rank) B A drop(x)",
        parameters="rank (in + out) per matrix",
        citation="Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic(
        {"up": Role.SIGNED, "down": Role.FACTOR},
        undefined={"taken_*": "its update is B A less what its start took, which no sum of factors gives"},
        free=("alpha", "stabilised", "dropout", "up_rate", "init", "rho"),
    )

    alpha: Annotated[float | None, Above(0)] = None
    stabilised: bool = False
    dropout: Annotated[float, Between(0, 1)] = 0.0
    up_rate: Annotated[float, Above(0)] = 1.0
    init: Init = "kaiming"

    @property
    def card(self) -> Card:
        return replace(super().card, identity_at_init=INITIALISERS[self.init].identity)

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)

    def fits(self, site: Site) -> bool:
        return site.has_matrix

    def build(self, site: Site) -> nn.Module:
        return LowRank(site, self)

    def update(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        down, up = tensors["down"], self.scale * tensors["up"]
        if "taken_down" not in tensors:
            return down, up
        return torch.cat([down, tensors["taken_down"]], -2), torch.cat([up, -tensors["taken_up"]], -1)

    def learning_rates(self) -> Mapping[str, float]:
        return {"up": self.up_rate} if self.up_rate != 1.0 else {}


class LowRank(LowRankModule):
    taken_down: Tensor | None
    taken_up: Tensor | None

    def __init__(self, site: Site, technique: LoRA) -> None:
        super().__init__()
        self.scale, self.dropout = technique.scale, technique.dropout
        start = INITIALISERS[technique.init].start(site, technique.rank_at(site), self.scale)
        self.down, self.up = nn.Parameter(start.down.contiguous()), nn.Parameter(start.up.contiguous())
        register_taken(self, start.taken)

    def taken(self) -> tuple[Tensor, Tensor] | None:
        return None if self.taken_down is None or self.taken_up is None else (self.taken_down, self.taken_up)
