"""LoHa: the elementwise product of two low-rank matrices (Hyeon-Woo et al. 2021, arXiv:2108.06098).

delta = s (A1 B1) * (A2 B2), s = alpha / rank: of rank up to rank^2 for the price of two rank-`rank` products. All
four factors start Kaiming-uniform (a = sqrt 5) but B2 (`down2`), which is zero, so attaching changes no output.
The product has thin factors of width rank^2: each row of the left one is the Kronecker product of the rows of A1
and A2, and the columns of the right one likewise. Where these are smaller than the matrix, they run in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor, nn

from graftwork.engine.modules import DeltaModule, LowRankModule, uniform, zeros
from graftwork.errors import BadOption
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import Above, AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class LoHa(Technique):
    """Update each chosen matrix by the elementwise product of two low-rank matrices.

    Args:
        rank: inner width of each of the two products.
        alpha: numerator of the scale; None means `rank` (scale 1).
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
        formula="y = W x + (alpha / rank) ((A1 B1) * (A2 B2)) x",
        parameters="2 rank (in + out) per matrix",
        citation="Hyeon-Woo et al. 2021, FedPara: Low-Rank Hadamard Product for Communication-Efficient "
        "Federated Learning, arXiv:2108.06098",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic(
        {"down2": Role.SIGNED, "down1": Role.FACTOR, "up1": Role.FACTOR, "up2": Role.FACTOR}, free=("alpha",)
    )

    rank: Annotated[int, AtLeast(1)] = 8
    alpha: Annotated[float | None, Above(0)] = None

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def fits(self, site: Site) -> bool:
        return site.multiplies

    def build(self, site: Site) -> nn.Module:
        rows, columns = site.width_out, site.width_in
        if self.rank > min(rows, columns):
            raise BadOption(
                f"{self.name}: rank={self.rank} is above a side of the {rows} x {columns} matrix {site.key}"
            )
        thin = self.rank**2 * (rows + columns) < rows * columns
        return (ThinHadamard if thin else Hadamard)(site, self.rank, self.scale)


class Hadamard(DeltaModule):
    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__()
        self.up1 = uniform(*site.batch, site.width_out, rank)
        self.down1 = uniform(*site.batch, rank, site.width_in)
        self.up2 = uniform(*site.batch, site.width_out, rank)
        self.down2 = zeros(*site.batch, rank, site.width_in)
        self.scale = scale

    def delta(self) -> Tensor:
        return self.scale * (self.up1 @ self.down1) * (self.up2 @ self.down2)


class ThinHadamard(Hadamard, LowRankModule):
    def factors(self) -> tuple[Tensor, Tensor]:
        down = self.down1.unsqueeze(-2) * self.down2.unsqueeze(-3)  # (..., rank, rank, I)
        up = self.up1.unsqueeze(-1) * self.up2.unsqueeze(-2)  # (..., O, rank, rank)
        return down.flatten(-3, -2), up.flatten(-2)
