"""SHiRA: a sparse update of high rank (Bhardwaj et al. 2024, arXiv:2406.13175).

Of each matrix, rank (in + out) values at random places are trained, as many as a LoRA of that rank has; the others
stay. They are stored as differences, which start at zero, so attaching changes no output. Matrices of one shape share
their places; a file holds the seed of the places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from graftwork.engine.modules import DeltaModule, zeros
from graftwork.engine.seeded import Frozen, generator
from graftwork.errors import BadOption
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import (
    Adaptation,
    Input,
    Insertion,
    Integration,
    InterConnectivity,
    IntraConnectivity,
)
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class SHiRA(Technique):
    """Train a few scattered values of each chosen matrix.

    Args:
        rank: of the LoRA that has as many values: rank (in + out) values per matrix.
        seed: of their places.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.SPARSE,
        inter_connectivity=InterConnectivity.FIXED_SPARSE,
        adaptation=Adaptation.REPARAMETERISATION,
        input=Input.WEIGHTS,
        insertion=Insertion.PARALLEL,
        integration=Integration.DIRECT_ADDITION,
        workspaces=("attention.query|attention.qkv|ssm.in|conv|linear", "attention.value?|ssm.out?"),
        linear=True,
        identity_at_init=True,
        formula="y = (W + S) x, S zero but at fixed places",
        parameters="rank (in + out) per matrix",
        citation="Bhardwaj et al. 2024, Sparse High Rank Adapters, arXiv:2406.13175",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic({"values": Role.CHANGE})

    rank: Annotated[int, AtLeast(1)] = 32
    seed: Annotated[int, AtLeast(0)] = 0

    def fits(self, site: Site) -> bool:
        return site.multiplies

    def count(self, site: Site) -> int:
        """Values trained per matrix."""
        return self.rank * (site.width_out + site.width_in)

    def build(self, site: Site) -> nn.Module:
        values = site.width_out * site.width_in
        if self.count(site) > values:
            raise BadOption(
                f"{self.name}: rank={self.rank} means {self.count(site)} values, and the matrix {site.key} has "
                f"{values}; take rank at most {values // (site.width_out + site.width_in)}"
            )
        return Scattered(site, self.count(site))

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        shapes = {shape_name(site): site for site in sites}
        places = {name: self.places(site) for name, site in shapes.items()}
        return Frozen(places, sites[0].device) if sites else None

    def places(self, site: Site) -> Tensor:
        """Numbers of the trained values, counted row by row, in order."""
        return self.drawn(site.width_in, site.width_out)

    def drawn(self, width_in: int, width_out: int) -> Tensor:
        """The same, for a matrix of these widths."""
        order = torch.randperm(width_out * width_in, generator=generator(self.seed), device="cpu")
        return order[: self.rank * (width_out + width_in)].sort().values


class Scattered(DeltaModule):
    def __init__(self, site: Site, count: int) -> None:
        super().__init__()
        self.values = zeros(*site.batch, count)
        self.shape, self.matrix = site.shape, shape_name(site)

    def adopt(self, shared: Frozen) -> None:
        self.shared = shared

    def delta(self) -> Tensor:
        flat = self.values.new_zeros(*self.values.shape[:-1], self.shape[-2] * self.shape[-1])
        return flat.index_copy(-1, self.shared[self.matrix], self.values).view(self.shape)


def shape_name(site: Site) -> str:
    return f"{site.width_out}x{site.width_in}"
