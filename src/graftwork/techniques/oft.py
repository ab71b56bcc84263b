"""OFT: rotate blocks of the input channels (Qiu et al. 2023, arXiv:2306.07280).

The host's matrix becomes W' = W R with R = diag(R_1, R_2, ...) orthogonal, so that W x turns into W (R x). Each
block is the Cayley transform R_k = (I + Q_k)(I - Q_k)^-1 of a skew-symmetric Q_k, of which the entries above the
diagonal are trained. They start at zero: R = I, and attaching changes no output. With `terms` the inverse is cut
to a Neumann series, which needs no solver and is orthogonal only near I (as HF PEFT's default).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from torch import Tensor, nn

from graftwork.engine.blockwise import blockwise
from graftwork.engine.modules import WeightModule, zeros
from graftwork.engine.recomputed import recomputed
from graftwork.errors import BadOption
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card, Sharing
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Technique

if TYPE_CHECKING:
    from graftwork.engine.below import Below


@register
@dataclass(frozen=True, kw_only=True)
class OFT(Technique):
    """Multiply each chosen matrix from the right by a block-diagonal rotation.

    Args:
        block: channels that are rotated together; must divide the input width.
        terms: powers of Q in I + 2Q + ... + 2Q^(terms-2) + Q^(terms-1), which replaces the exact rotation.
        one_block: the same rotation for all blocks of a matrix.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.SPARSE,
        adaptation=Adaptation.REPARAMETERISATION,
        sharing=Sharing.NONE,
        input=Input.WEIGHTS,
        insertion=Insertion.SEQUENTIAL,
        integration=Integration.RESCALING,
        workspaces=("attention.query|attention.qkv|ssm.in|conv|linear", "attention.value?|ssm.out?"),
        linear=True,
        identity_at_init=True,
        formula="y = W R x, R = diag(R_1, R_2, ...), R_k = (I + Q_k)(I - Q_k)^-1",
        parameters="in (block - 1) / 2 per matrix",
        citation="Qiu et al. 2023, Controlling Text-to-Image Diffusion by Orthogonal Finetuning, "
        "arXiv:2306.07280",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic({"skew": Role.CHANGE})

    block: Annotated[int, AtLeast(2)] = 32
    terms: Annotated[int | None, AtLeast(2)] = None
    one_block: bool = False

    def fits(self, site: Site) -> bool:
        return site.multiplies

    def build(self, site: Site) -> nn.Module:
        check_divides(self.name, "block", self.block, site)
        return Rotation(site, self.block, self.terms, self.one_block)


class Rotation(WeightModule):
    def __init__(self, site: Site, block: int, terms: int | None, one_block: bool) -> None:
        super().__init__()
        self.block, self.terms, self.count = block, terms, site.width_in // block
        self.skew = zeros(*site.batch, 1 if one_block else self.count, block * (block - 1) // 2)

    def blocks(self) -> Tensor:
        """The rotations (..., count, block, block)."""
        blocks = cayley(self.skew, self.block, self.terms)
        return blocks.expand(*blocks.shape[:-3], self.count, -1, -1)

    def effective(self, weight: Tensor, base: Tensor) -> Tensor:
        return recomputed(blockwise, weight, self.blocks().mT.unsqueeze(-4)).to(weight.dtype)

    def answer(self, x: Tensor, below: Below) -> Tensor:
        return below(blockwise(x, self.blocks()))


def cayley(upper: Tensor, size: int, terms: int | None = None) -> Tensor:
    """(I + Q)(I - Q)^-1 of skew-symmetric Q (..., size, size), given above the diagonal row by row; fp32 at least."""
    upper = upper.float() if upper.element_size() < 4 else upper
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    half = upper.new_zeros(*upper.shape[:-1], size, size)
    half[..., rows, columns] = upper
    skew = half - half.mT
    one = torch.eye(size, dtype=upper.dtype, device=upper.device)
    if terms is None:
        return torch.linalg.solve(one - skew, one + skew)
    series = one.expand_as(skew)
    for _ in range(terms - 2):
        series = one + skew @ series
    return series + skew @ series


def check_divides(technique: str, option: str, size: int, site: Site) -> None:
    """Refuse a size that does not divide the input width of a site."""
    width = site.width_in
    if width % size:
        divisors = ", ".join(str(d) for d in range(2, width + 1) if width % d == 0)
        raise BadOption(
            f"{technique}: {option}={size} does not divide the input width {width} of {site.key}; choose one of "
            f"its divisors {divisors}, or other workspaces"
        )
