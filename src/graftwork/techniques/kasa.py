"""KaSA: a weight without its smallest components and an update like an SVD (Wang et al. 2024, arXiv:2412.06071).

W_world is W without its `rank` smallest singular components; W' = W_world + s B diag(d) A with s = alpha / rank, B
zero, A Kaiming-uniform and d standard normal, one value for each inner coordinate. So the output at the start is that
of the truncated model, not of the base. Switched off or detached, the base is what it was: the components cut out stand
beside it as a frozen pair, which travels in the adapter's file, so no truncated copy of a weight is kept.

The paper's penalties are objectives: `singular-values` (its Eq. 10, the sum of d squared) and `orthogonality` (Eq. 11),
summed over matrices with weights beta and gamma; the scripts published with it average over matrices instead.

Paper and code differ in what is cut. The paper cuts `rank` of the min(in, out) components (the default here). The code
keeps the first in - rank of them, which cuts nothing where in - rank >= out (`truncation="published-code"`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from graftwork.engine.modules import LowRankModule
from graftwork.initialisers import INITIALISERS
from graftwork.initialisers.of_weight import Truncation, truncated
from graftwork.initialisers.ranked import Initialised
from graftwork.initialisers.start import register_taken
from graftwork.reference.arithmetic import Arithmetic
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import Above, Because, Between, Technique


@register
@dataclass(frozen=True, kw_only=True)
class KaSA(Initialised):
    """An update with trained singular values on a weight without its smallest ones.

    Args:
        rank: inner width of the update, and how many components are cut; below min(in, out).
        alpha: numerator of the scale alpha / rank; None means 2 rank.
        dropout: probability of dropping an element of the update's input while training.
        truncation: what is cut: "paper" or "published-code"; "given": to be filled from a file.
        init: where A starts; B starts at zero.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.LINEAR,
        adaptation=Adaptation.REPARAMETERISATION,
        input=Input.HIDDEN,
        insertion=Insertion.PARALLEL,
        integration=Integration.SCALED_ADDITION,
        workspaces=("attention.query|attention.qkv|ssm.in|conv|linear", "attention.value?|ssm.out?"),
        linear=True,
        identity_at_init=False,
        formula="y = W_world x + (alpha / rank) B (d * (A drop(x)))",
        parameters="rank (in + out + 1) per matrix",
        citation="Wang et al. 2024, KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models, "
        "arXiv:2412.06071",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic(
        undefined={"*": "it stands on a weight without its smallest components, which no sum puts back"},
        free=("alpha", "dropout", "init"),
    )

    alpha: Annotated[float | None, Above(0)] = None
    dropout: Annotated[float, Between(0, 1)] = 0.0
    truncation: Truncation = "paper"
    init: Annotated[
        Literal["kaiming", "gaussian", "eva"], Because("others take a part of their own out of the weight")
    ] = "kaiming"

    @property
    def scale(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def fits(self, site: Site) -> bool:
        return site.multiplies

    def build(self, site: Site) -> nn.Module:
        return SingularValues(site, self)

    def update(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        up = self.scale * tensors["up"] * tensors["values"].unsqueeze(-2)
        down = torch.cat([tensors["down"], tensors["taken_down"]], -2)
        return down, torch.cat([up, -tensors["taken_up"]], -1)

    def stored(self) -> Technique:
        return replace(self, truncation="given", init=INITIALISERS[self.init].stored)  # type: ignore[arg-type]


class SingularValues(LowRankModule):
    taken_down: Tensor
    taken_up: Tensor

    def __init__(self, site: Site, technique: KaSA) -> None:
        super().__init__()
        start = INITIALISERS[technique.init].start(site, technique.rank, technique.scale)
        self.down, self.up = nn.Parameter(start.down), nn.Parameter(start.up)
        self.values = nn.Parameter(torch.randn(*site.batch, technique.rank))
        self.scale, self.dropout = technique.scale, technique.dropout
        register_taken(self, truncated(site, technique.rank, technique.truncation))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up * self.values.unsqueeze(-2)

    def taken(self) -> tuple[Tensor, Tensor]:
        return self.taken_down, self.taken_up
