"""RandLoRA: a full-rank update from frozen random bases (Albert et al. 2025, arXiv:2502.00987).

delta = s sum_n B_n diag(lambda_n) A diag(gamma_n), s = alpha / rank, over n = ceil(smaller side / rank) terms, for a
matrix whose input is its smaller side; else its transpose is made so. A (rank, smaller) and B (larger, n, rank) are
drawn once for all sites, at the largest, and cut to each site's; lambda and gamma are trained. lambda starts at zero,
so attaching changes no output, gamma at 1 / its longer side. A file holds the seed of A and B. Which columns of B
belong to a term is a matter of counting, as they are random; here, as in HF PEFT, B_n has columns n, n + terms, ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Generator, Tensor, nn

from graftwork.engine.modules import LowRankModule, zeros
from graftwork.engine.recomputed import recomputed
from graftwork.engine.seeded import Frozen, frozen_for, generator
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
        return frozen_for(sites, self.frozen)

    def frozen(self, width_in: int, width_out: int) -> dict[str, Tensor]:
        """A (rank, smaller) as `inner` and B (larger, n, rank) as `outer`, for sites of at most these widths."""
        source, (small, large) = generator(self.seed), sorted((width_in, width_out))
        inner = drawn(source, self.rank, small)
        outer = [drawn(source, large, self.rank) for _ in range(-(-small // self.rank))]
        return {"inner": of_deviation_one(inner), "outer": of_deviation_one(torch.stack(outer, 1))}


class Bases(LowRankModule):
    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__()
        small, large = sorted((site.width_in, site.width_out))
        terms = -(-small // rank)
        self.weights = zeros(*site.batch, rank, terms)  # lambda
        self.gains = nn.Parameter(torch.full((*site.batch, terms, small), 1 / max(terms, small)))  # gamma
        self.scale, self.large, self.narrows = scale, large, site.width_out < site.width_in

    def adopt(self, shared: Frozen) -> None:
        self.shared = shared

    def factors(self) -> tuple[Tensor, Tensor]:
        terms, small = self.gains.shape[-2:]
        inner = recomputed(scaled, self.shared["inner"][:, :small], self.weights, self.gains)
        outer = self.shared["outer"][: self.large, :terms].flatten(1)
        return (outer.mT, inner.mT) if self.narrows else (inner, outer)


def scaled(basis: Tensor, weights: Tensor, gains: Tensor) -> Tensor:
    """A (rank, smaller) between lambda and gamma of each term, (..., rank n, smaller)."""
    terms = weights.unsqueeze(-1) * basis.unsqueeze(-2) * gains.unsqueeze(-3)  # (..., rank, n, smaller)
    return terms.flatten(-3, -2)


def drawn(source: Generator, rows: int, columns: int) -> Tensor:
    """In +-1 / sqrt(columns), drawn as HF PEFT draws it: in bf16, whose values are others than those of fp32."""
    bound = 1 / math.sqrt(columns)
    basis = torch.empty(rows, columns, dtype=torch.bfloat16, device="cpu")
    return basis.uniform_(-bound, bound, generator=source)


def of_deviation_one(basis: Tensor) -> Tensor:
    """Divided by the deviation of its values, in bf16; given in fp32."""
    return (basis / basis.std()).float()
