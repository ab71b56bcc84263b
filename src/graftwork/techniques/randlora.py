"""RandLoRA: a full-rank update from frozen random bases (Albert et al. 2025, arXiv:2502.00987).

delta = s sum_n B_n diag(lambda_n) A diag(gamma_n), s = alpha / rank, over n = ceil(smaller side / rank) terms, for a
matrix whose input is its smaller side; else its transpose is made so. A (rank, smaller) and B (larger, n, rank) are
drawn once for all sites, at the largest, and cut to each site's; lambda and gamma are trained. lambda starts at zero,
so attaching changes no output, gamma at 1 / its longer side. A file holds the seed of A and B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from graftwork.engine.modules import DeltaModule, zeros
from graftwork.engine.recomputed import recomputed
from graftwork.engine.seeded import Frozen, generator, spread
from graftwork.errors import BadOption
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import Above, AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class RandLoRA(Technique):
    """Update each chosen matrix by a full-rank sum of frozen random low-rank products, scaled by trained numbers.

    Args:
        rank: of each product; fewer trained numbers where it is larger.
        alpha: numerator of the scale alpha / rank; None means 20 rank.
        seed: of the frozen bases.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.LINEAR,
        adaptation=Adaptation.REPARAMETERISATION,
        input=Input.HIDDEN,
        insertion=Insertion.PARALLEL,
        integration=Integration.SCALED_ADDITION,
        workspaces=("attention.query|attention.qkv|ssm.in|conv|linear", "attention.value?|ssm.out?"),
        linear=True,
        identity_at_init=True,
        formula="y = W x + (alpha / rank) sum_n B_n diag(lambda_n) A diag(gamma_n) x, A and B_n frozen",
        parameters="n (rank + min(in, out)) per matrix, n = ceil(min(in, out) / rank)",
        citation="Albert et al. 2025, RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models, "
        "arXiv:2502.00987",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic(
        {"weights": Role.SIGNED, "gains": Role.FACTOR}, free=("alpha",)
    )

    rank: Annotated[int, AtLeast(1)] = 32
    alpha: Annotated[float | None, Above(0)] = None
    seed: Annotated[int, AtLeast(0)] = 0

    @property
    def scale(self) -> float:
        return 20.0 if self.alpha is None else self.alpha / self.rank

    def fits(self, site: Site) -> bool:
        return site.multiplies

    def build(self, site: Site) -> nn.Module:
        small = min(site.width_in, site.width_out)
        if self.rank > small:
            raise BadOption(
                f"{self.name}: rank={self.rank} is above the smaller side, {small}, of {site.key}"
            )
        return Bases(site, self.rank, self.scale)

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        if not sites:
            return None
        small = max(min(site.width_in, site.width_out) for site in sites)
        large = max(max(site.width_in, site.width_out) for site in sites)
        source, terms = generator(self.seed), -(-small // self.rank)
        inner = spread(1.0, (self.rank, small), source)
        outer = spread(1.0, (large, terms, self.rank), source)
        return Frozen({"inner": inner / inner.std(), "outer": outer / outer.std()}, sites[0].device)


class Bases(DeltaModule):
    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__()
        small, large = sorted((site.width_in, site.width_out))
        terms = -(-small // rank)
        self.weights = zeros(*site.batch, rank, terms)  # lambda
        self.gains = nn.Parameter(torch.full((*site.batch, terms, small), 1 / max(terms, small)))  # gamma
        self.scale, self.large, self.narrows = scale, large, site.width_out < site.width_in

    def adopt(self, shared: Frozen) -> None:
        self.shared = shared

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weights, self.gains, self.shared["inner"], self.shared["outer"][: self.large]

    def delta(self) -> Tensor:
        inner, outer = products(*self.factors())
        delta = self.scale * (outer @ inner)
        return delta.mT if self.narrows else delta

    def added(self, x: Tensor) -> Tensor:
        return self.scale * recomputed(narrowed if self.narrows else widened, x, *self.factors())


def products(weights: Tensor, gains: Tensor, inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled inner bases (..., n rank, smaller) and outer bases (larger, n rank)."""
    terms, small = gains.shape[-2:]
    scaled = weights.mT.unsqueeze(-1) * inner[:, :small] * gains.unsqueeze(-2)  # (..., n, rank, smaller)
    return scaled.flatten(-3, -2), outer[:, :terms].flatten(1)


def widened(x: Tensor, *factors: Tensor) -> Tensor:
    inner, outer = (matrix.to(x.dtype) for matrix in products(*factors))
    return x @ inner.mT @ outer.mT


def narrowed(x: Tensor, *factors: Tensor) -> Tensor:
    inner, outer = (matrix.to(x.dtype) for matrix in products(*factors))
    return x @ outer @ inner
