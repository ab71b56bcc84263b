"""LoKr: a Kronecker product beside a frozen matrix (Yeh et al. 2023, LyCORIS, arXiv:2309.14859).

delta = s kron(C, D), s = alpha / rank. The widths are split into out = o1 o2 and in = i1 i2 as evenly as they divide;
C is (o1, i1), and D is (o2, i2), or a product of rank `rank` where that is below half its longer side. C (`left`)
starts at zero, so attaching changes no output; D starts Kaiming-uniform with a = sqrt 5. A signal passes one factor
after the other, never the matrix: kron(C, D) x = C X Dᵀ with X the signal as an (i1, i2) matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor, nn

from graftwork.engine.kronecker import kronecker
from graftwork.engine.modules import DeltaModule, uniform, zeros
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import Above, AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class LoKr(Technique):
    """Update each chosen matrix by a Kronecker product of two small ones.

    Args:
        rank: inner width of the right factor, which is kept whole where rank is at least half its longer side.
        alpha: numerator of the scale alpha / rank; None means `rank` (scale 1).
        factor: size of the left factor's sides, where it divides them; None means the most even split.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.HYPERCOMPLEX,
        adaptation=Adaptation.REPARAMETERISATION,
        input=Input.HIDDEN,
        insertion=Insertion.PARALLEL,
        integration=Integration.SCALED_ADDITION,
        workspaces=("attention.query|attention.qkv|ssm.in|conv|linear", "attention.value?|ssm.out?"),
        linear=True,
        identity_at_init=True,
        formula="y = W x + (alpha / rank) kron(C, D) x, D = D1 D2",
        parameters="o1 i1 + rank (o2 + i2) per matrix, o1 o2 = out, i1 i2 = in",
        citation="Yeh et al. 2023, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model "
        "Evaluation, arXiv:2309.14859",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic(
        {"left": Role.SIGNED, "right.0": Role.FACTOR, "right.1": Role.FACTOR}, free=("alpha",)
    )

    rank: Annotated[int, AtLeast(1)] = 8
    alpha: Annotated[float | None, Above(0)] = None
    factor: Annotated[int | None, AtLeast(1)] = None

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def fits(self, site: Site) -> bool:
        return site.multiplies

    def build(self, site: Site) -> nn.Module:
        return Kronecker(site, self)


class Kronecker(DeltaModule):
    def __init__(self, site: Site, chosen: LoKr) -> None:
        super().__init__()
        kernel = math.prod(site.kernel)  # stays whole in the right factor
        o1, o2 = divided(site.width_out, chosen.factor)
        i1, i2 = divided(site.width_in // kernel, chosen.factor)
        whole = chosen.rank >= max(o2, i2) / 2
        shapes = ((o2, i2 * kernel),) if whole else ((o2, chosen.rank), (chosen.rank, i2 * kernel))
        self.left = zeros(*site.batch, o1, i1)
        self.right = nn.ParameterList([uniform(*site.batch, *shape) for shape in shapes])
        self.scale = chosen.scale

    def delta(self) -> Tensor:
        right = self.right[0] @ self.right[1] if len(self.right) == 2 else self.right[0]
        left = self.scale * self.left
        product = left[..., :, None, :, None] * right[..., None, :, None, :]
        return product.flatten(-2).flatten(-3, -2)

    def added(self, x: Tensor) -> Tensor:
        return kronecker(x, self.scale * self.left, *self.right)


def divided(width: int, factor: int | None) -> tuple[int, int]:
    """(m, n) with m n = width: m = factor where it divides, else the largest divisor m <= n, at most factor."""
    if factor is not None and width % factor == 0:
        return factor, width // factor
    most = min(math.isqrt(width), factor or width)
    m = next(m for m in range(most, 0, -1) if width % m == 0)
    return m, width // m
