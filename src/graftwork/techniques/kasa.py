"""KaSA: cut the smallest singular components out of the weight, learn an update shaped like an SVD (Wang et al. 2024,
arXiv:2412.06071).

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
from graftwork.errors import BadOption
from graftwork.initialisers import kaiming, matrices
from graftwork.reference.arithmetic import Arithmetic
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import Above, AtLeast, Between, Technique


@register
@dataclass(frozen=True, kw_only=True)
class KaSA(Technique):
    """An update with trained singular values on a weight without its smallest ones.

    Args:
        rank: inner width of the update, and how many components are cut; below min(in, out).
        alpha: numerator of the scale alpha / rank; None means 2 rank.
        dropout: probability of dropping an element of the update's input while training.
        truncation: what is cut: "paper" or "published-code"; "given": to be filled from a file.
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
        free=("alpha", "dropout"),
    )

    rank: Annotated[int, AtLeast(1)] = 8
    alpha: Annotated[float | None, Above(0)] = None
    dropout: Annotated[float, Between(0, 1)] = 0.0
    truncation: Literal["paper", "published-code", "given"] = "paper"

    @property
    def scale(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def fits(self, site: Site) -> bool:
        return site.multiplies

    def build(self, site: Site) -> nn.Module:
        smaller = min(site.width_out, site.width_in)
        if self.rank >= smaller:
            raise BadOption(
                f"kasa: rank={self.rank} at {site.key}, whose matrix is {site.width_out} x {site.width_in}: it cuts "
                f"as many singular components as its rank, so at most {smaller - 1}"
            )
        return SingularValues(site, self)

    def update(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        up = self.scale * tensors["up"] * tensors["values"].unsqueeze(-2)
        down = torch.cat([tensors["down"], tensors["taken_down"]], -2)
        return down, torch.cat([up, -tensors["taken_up"]], -1)

    def stored(self) -> Technique:
        return replace(self, truncation="given")


class SingularValues(LowRankModule):
    taken_down: Tensor
    taken_up: Tensor

    def __init__(self, site: Site, technique: KaSA) -> None:
        super().__init__()
        start = kaiming(site, technique.rank, technique.scale)
        self.down, self.up = nn.Parameter(start.down), nn.Parameter(start.up)
        self.values = nn.Parameter(torch.randn(*site.batch, technique.rank))
        self.scale, self.dropout = technique.scale, technique.dropout
        down, up = _cut(site, technique)
        self.register_buffer("taken_down", down.contiguous())
        self.register_buffer("taken_up", up.contiguous())

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up * self.values.unsqueeze(-2)

    def taken(self) -> tuple[Tensor, Tensor]:
        return self.taken_down, self.taken_up


def _cut(site: Site, technique: KaSA) -> tuple[Tensor, Tensor]:
    """(down (..., R, I), up (..., O, R)) whose product is what leaves the weight."""
    if technique.truncation == "given" or matrices.planned():
        rank = technique.rank
        return matrices.zeros(site, rank, site.width_in), matrices.zeros(site, site.width_out, rank)
    assert site.matrix is not None
    weight = matrices.finite(site.matrix(), f"{site.key}: its weight")
    left, values, right = matrices.bottom_singular(weight, technique.rank)
    if technique.truncation == "published-code":
        first = min(weight.shape[-2:]) - technique.rank
        kept = (
            torch.arange(first, first + technique.rank, device=values.device) < site.width_in - technique.rank
        )
        values = values.masked_fill(kept, 0.0)
    return right.mT, left * values.unsqueeze(-2)
