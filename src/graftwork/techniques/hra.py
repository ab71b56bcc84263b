"""HRA: reflect the input channels a few times (Yuan et al. 2024, arXiv:2405.17484).

The host's matrix becomes W' = W H_1 H_2 ... H_r with H_k = I - 2 u_k u_k^T / |u_k|^2, one trained vector u_k each.
The vectors start as equal pairs, Kaiming-uniform with a = sqrt 5; a reflection undoes itself, so attaching changes no
output. The product is never formed: with unit vectors as the columns of U it is I - U T U^T, where the inverse of T is
upper triangular, 1/2 on the diagonal and u_j^T u_k above it (compact WY form, Schreiber and Van Loan 1989).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.engine.modules import WeightModule
from graftwork.errors import BadOption
from graftwork.reference.arithmetic import Arithmetic
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Technique

if TYPE_CHECKING:
    from graftwork.engine.below import Below


@register
@dataclass(frozen=True, kw_only=True)
class HRA(Technique):
    """Multiply each chosen matrix from the right by a product of reflections.

    Args:
        rank: number of reflections, even: they start in pairs.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.LINEAR,
        adaptation=Adaptation.REPARAMETERISATION,
        input=Input.WEIGHTS,
        insertion=Insertion.SEQUENTIAL,
        integration=Integration.RESCALING,
        workspaces=("attention.query|attention.qkv|ssm.in|conv|linear", "attention.value?|ssm.out?"),
        linear=True,
        identity_at_init=True,
        formula="y = W H_1 H_2 ... H_rank x, H_k = I - 2 u_k u_k^T / |u_k|^2",
        parameters="rank in per matrix",
        citation="Yuan et al. 2024, Bridging The Gap between Low-rank and Orthogonal Adaptation via "
        "Householder Reflection Adaptation, arXiv:2405.17484",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic(
        undefined={"*": "u and -u are the same reflection, so a sum of vectors means nothing"}
    )

    rank: Annotated[int, AtLeast(2)] = 8

    def fits(self, site: Site) -> bool:
        return site.multiplies

    def build(self, site: Site) -> nn.Module:
        if self.rank % 2:
            raise BadOption(
                f"{self.name}: rank={self.rank} is odd, and an odd number of reflections cannot start as the "
                f"identity; choose {self.rank - 1} or {self.rank + 1}"
            )
        return Reflections(site, self.rank)


class Reflections(WeightModule):
    def __init__(self, site: Site, rank: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(site.width_in)
        half = torch.empty(*site.batch, rank // 2, site.width_in).uniform_(-bound, bound)
        self.vectors = nn.Parameter(half.repeat_interleave(2, dim=-2))

    def factors(self) -> tuple[Tensor, Tensor]:
        """U^T (..., rank, I), its rows of length one, and T (..., rank, rank), in fp32 at least."""
        vectors = self.vectors.float() if self.vectors.element_size() < 4 else self.vectors
        unit = functional.normalize(vectors, dim=-1)
        half = 0.5 * torch.eye(unit.shape[-2], dtype=unit.dtype, device=unit.device)
        inverse = (unit @ unit.mT).triu(1) + half
        return unit, torch.linalg.solve_triangular(inverse, 2 * half, upper=True)

    def effective(self, weight: Tensor, base: Tensor) -> Tensor:
        unit, inner = (factor.to(weight.dtype) for factor in self.factors())
        return (weight - weight @ unit.mT @ inner @ unit).to(weight.dtype)

    def answer(self, x: Tensor, below: Below) -> Tensor:
        unit, inner = (factor.to(x.dtype) for factor in self.factors())
        return below(x - (x @ unit.mT @ inner.mT @ unit).to(x.dtype))
