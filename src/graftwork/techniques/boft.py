"""BOFT: rotate the input channels by a butterfly of small rotations (Liu et al. 2023, arXiv:2311.06243).

The host's matrix becomes W' = diag(s) W R with R = B_1 B_2 ... B_m. Each B is orthogonal: channels are gathered into
blocks, every block is rotated by the Cayley transform of a skew-symmetric matrix as in OFT, and channels go back.
Factor j + 1 pairs half-blocks that lie 2^j half-blocks apart, as the fast Fourier transform does, so that m factors mix
block 2^(m-1) channels. Rotations start at I and s at one, so attaching changes no output. One factor and s = 1 is OFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from torch import Tensor, nn

from graftwork.engine.blockwise import blockwise
from graftwork.engine.modules import WeightModule, zeros
from graftwork.engine.rescaled import rescaled
from graftwork.errors import BadOption
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Technique
from graftwork.techniques.oft import cayley, check_divides

if TYPE_CHECKING:
    from graftwork.engine.below import Below


@register
@dataclass(frozen=True, kw_only=True)
class BOFT(Technique):
    """Multiply each chosen matrix from the right by a product of sparse rotations, and its rows by a gain.

    Args:
        block: channels that are rotated together; even where there are several factors.
        butterflies: number of factors m; block 2^(m-1) must divide the input width.
        terms: powers of a truncated series instead of the exact rotation, as in OFT.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.SPARSE,
        adaptation=Adaptation.REPARAMETERISATION,
        input=Input.WEIGHTS,
        insertion=Insertion.SEQUENTIAL,
        integration=Integration.RESCALING,
        workspaces=("attention.query|attention.qkv|ssm.in|conv|linear", "attention.value?|ssm.out?"),
        linear=True,
        identity_at_init=True,
        formula="y = s * (W B_1 B_2 ... B_m x), each B a permuted block-diagonal rotation",
        parameters="butterflies in (block - 1) / 2 + out per matrix",
        citation="Liu et al. 2023, Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, "
        "arXiv:2311.06243",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic({"skew": Role.CHANGE, "gain": Role.GAIN})

    block: Annotated[int, AtLeast(2)] = 4
    butterflies: Annotated[int, AtLeast(1)] = 1
    terms: Annotated[int | None, AtLeast(2)] = None

    def fits(self, site: Site) -> bool:
        return site.multiplies

    def build(self, site: Site) -> nn.Module:
        check_divides(self.name, "block", self.block, site)
        if self.butterflies > 1 and self.block % 2:
            raise BadOption(
                f"{self.name}: block={self.block} must be even where there are several butterflies"
            )
        check_divides(self.name, "block * 2^(butterflies-1)", self.block << (self.butterflies - 1), site)
        return Butterfly(site, self.block, self.butterflies, self.terms)


class Butterfly(WeightModule):
    def __init__(self, site: Site, block: int, butterflies: int, terms: int | None) -> None:
        super().__init__()
        self.block, self.terms = block, terms
        self.skew = zeros(*site.batch, butterflies, site.width_in // block, block * (block - 1) // 2)
        self.gain = nn.Parameter(torch.ones(*site.batch, site.width_out))

    def effective(self, weight: Tensor, base: Tensor) -> Tensor:
        factors = cayley(self.skew, self.block, self.terms).mT.unsqueeze(-5)
        for level in range(self.skew.shape[-3]):  # R^T on each row, so its first factor first
            weight = one_factor(weight, factors, level)
        return (weight * self.gain.unsqueeze(-1).to(weight.dtype)).to(base.dtype)

    def answer(self, x: Tensor, below: Below) -> Tensor:
        factors = cayley(self.skew, self.block, self.terms)
        return rescaled(below(butterfly(x, factors)), self.gain, below.bias, in_place=below.bare)


def butterfly(x: Tensor, factors: Tensor) -> Tensor:
    """B_1 B_2 ... B_m x for x (..., I), factors (m, I / block, block, block)."""
    for level in reversed(range(len(factors))):
        x = one_factor(x, factors, level)
    return x


def one_factor(x: Tensor, factors: Tensor, level: int) -> Tensor:
    """Gather half-blocks 2^level apart into blocks, multiply each by its matrix, put them back."""
    blocks = factors[..., level, :, :, :]
    if level == 0:
        return blockwise(x, blocks)
    apart = x.unflatten(-1, (-1, 2, 1 << level, blocks.shape[-1] // 2)).transpose(-3, -2)
    inside = blockwise(apart.flatten(-4), blocks)
    return inside.unflatten(-1, apart.shape[-4:]).transpose(-3, -2).flatten(-4)
