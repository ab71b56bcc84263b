"""VeRA: trained vectors between frozen random matrices (Kopiczko et al. 2023, arXiv:2310.11454).

delta = diag(b) B diag(d) A with A (rank, in) and B (out, rank) drawn once for all sites, at the widest, and cut to
each site's widths. Only d and b are trained: d starts at `initial`, b at zero, so attaching changes no output. A file
holds the seed of A and B, not their values. `rank` may be larger than a side of the matrix, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Generator, Tensor, nn

from graftwork.engine.modules import LowRankModule, zeros
from graftwork.engine.scaled_product import scaled_product
from graftwork.engine.seeded import Frozen, frozen_for, generator, spread
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import Above, AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class VeRA(Technique):
    """Scale the inner and outer channels of a frozen random low-rank product that all sites share.

    Args:
        rank: inner width of the product.
        initial: what the inner vector starts at.
        seed: of the frozen matrices.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.LINEAR,
        adaptation=Adaptation.REPARAMETERISATION,
        input=Input.HIDDEN,
        insertion=Insertion.PARALLEL,
        integration=Integration.DIRECT_ADDITION,
        workspaces=("attention.query|attention.qkv|ssm.in|conv|linear", "attention.value?|ssm.out?"),
        linear=True,
        identity_at_init=True,
        formula="y = W x + diag(b) B diag(d) A x, A and B frozen",
        parameters="rank + out per matrix",
        citation="Kopiczko et al. 2023, VeRA: Vector-based Random Matrix Adaptation, arXiv:2310.11454",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic(
        {"outer": Role.SIGNED, "inner": Role.FACTOR}, free=("initial",)
    )

    rank: Annotated[int, AtLeast(1)] = 256
    initial: Annotated[float, Above(0)] = 0.1
    seed: Annotated[int, AtLeast(0)] = 0

    def fits(self, site: Site) -> bool:
        return site.multiplies

    def build(self, site: Site) -> nn.Module:
        return Scaled(site, self.rank, self.initial)

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        return frozen_for(sites, self.frozen)

    def frozen(self, width_in: int, width_out: int) -> dict[str, Tensor]:
        """A as `down` and B as `up`, for sites of at most these widths."""
        source = generator(self.seed)
        down = he_uniform(source, self.rank, width_in)
        return {"down": down, "up": he_uniform(source, width_out, self.rank)}


class Scaled(LowRankModule):
    def __init__(self, site: Site, rank: int, initial: float) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.full((*site.batch, rank), initial))
        self.outer = zeros(*site.batch, site.width_out)
        self.widths = site.width_in, site.width_out

    def adopt(self, shared: Frozen) -> None:
        self.shared = shared

    def frozen(self) -> tuple[Tensor, Tensor]:
        """A (rank, I) and B (O, rank)."""
        width_in, width_out = self.widths
        return self.shared["down"][:, :width_in], self.shared["up"][:width_out]

    def factors(self) -> tuple[Tensor, Tensor]:
        down, up = self.frozen()
        return self.inner.unsqueeze(-1) * down, self.outer.unsqueeze(-1) * up

    def added(self, x: Tensor) -> Tensor:
        down, up = self.frozen()
        return scaled_product(x, down, self.inner, up, self.outer)


def he_uniform(source: Generator, rows: int, columns: int) -> Tensor:
    """In +-sqrt(6 / columns), drawn as HF PEFT draws it."""
    return spread(math.sqrt(6 / columns), (rows, columns), source)
