"""FacT: one tensor decomposition for the updates of all matrices (Jie and Deng 2022, arXiv:2212.03145).

All chosen matrices are cut into d x d tiles, d the model's width, and the updates of the tiles stacked into one tensor
(tiles, d, d). A tensor-train makes tile i of it s V S_i U^T; a Tucker decomposition takes S_i = sum_k P_ik C_k besides.
U (d, rank), V (d, rank) and C (rank, rank, rank) are common to all matrices; S_i (rank, rank) or P_i (rank,) is a
tile's own. V starts at zero, so attaching changes no output; the paper does not say how the others start, here they do
as linear layers. The last tile of a side that is no multiple of d is cut off. The tiles of one matrix make thin
factors, of width rank times the tiles along its shorter side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from graftwork.engine.modules import LowRankModule, uniform, zeros
from graftwork.errors import BadOption
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card, Sharing
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import Above, AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class FacT(Technique):
    """Update all chosen matrices by one low-rank tensor, whose factors they share.

    Args:
        rank: of the decomposition along both sides of the matrices, and along their number in "tucker".
        alpha: the scale s.
        decomposition: "tensor-train" (FacT-TT) or "tucker" (FacT-TK), which has fewer numbers for each matrix.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.LINEAR,
        adaptation=Adaptation.REPARAMETERISATION,
        sharing=Sharing.SHARED,
        input=Input.HIDDEN,
        insertion=Insertion.PARALLEL,
        integration=Integration.SCALED_ADDITION,
        workspaces=("all-linear|conv",),
        linear=True,
        identity_at_init=True,
        formula="y = W x + alpha V S_i U^T x; in a Tucker decomposition S_i = sum_k P_ik C_k",
        parameters="rank^2 per d x d tile and 2 rank d once; Tucker: rank per tile, 2 rank d + rank^3 once",
        citation="Jie and Deng 2022, FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer, "
        "arXiv:2212.03145",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic(
        {"core": Role.SIGNED, "mixture": Role.SIGNED, "shared.*": Role.INNER}
    )

    rank: Annotated[int, AtLeast(1)] = 16
    alpha: Annotated[float, Above(0)] = 1.0
    decomposition: Literal["tensor-train", "tucker"] = "tensor-train"

    @property
    def scale(self) -> float:
        return self.alpha

    def fits(self, site: Site) -> bool:
        return site.multiplies

    def build(self, site: Site) -> nn.Module:
        return (Train if self.decomposition == "tensor-train" else Tucker)(site, self.rank, self.scale)

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        if not sites:
            return None
        width = min(site.width_in for site in sites)
        if self.rank > width:
            raise BadOption(
                f"{self.name}: rank={self.rank} is above the width {width} of the tiles, which is the smallest input "
                "width of the chosen sites"
            )
        tensors = {"down": uniform(self.rank, width), "up": zeros(width, self.rank)}
        if self.decomposition == "tucker":
            tensors["core"] = uniform(self.rank, self.rank, self.rank)
        return nn.ParameterDict(tensors)


class Train(LowRankModule):
    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__()
        self.widths, self.batch = (site.width_out, site.width_in), site.batch
        self.rank, self.scale = rank, scale

    def adopt(self, shared: nn.ParameterDict) -> None:
        width = len(shared["up"])
        with torch.device(shared["up"].device):
            self.share(*self.batch, *(-(-side // width) for side in self.widths))
        self.shared = shared

    def share(self, *tiles: int) -> None:
        """Make the tensors of this many tiles (..., along the output, along the input)."""
        self.core = uniform(*tiles, self.rank, self.rank)

    def cores(self) -> Tensor:
        """S of each tile, (..., tiles along the output, along the input, rank, rank)."""
        return self.core

    def factors(self) -> tuple[Tensor, Tensor]:
        down, up, cores = self.shared["down"], self.shared["up"], self.cores()
        (out, into), (high, wide) = self.widths, cores.shape[-4:-2]
        if high <= wide:
            rows = (cores @ down).transpose(-3, -2).flatten(-4, -3)  # (..., high * rank, wide, d)
            return rows.flatten(-2)[..., :into], torch.block_diag(*[up] * high)[:out]
        columns = (up @ cores).transpose(-3, -2).flatten(-2)  # (..., high, d, wide * rank)
        return torch.block_diag(*[down] * wide)[:, :into], columns.flatten(-3, -2)[..., :out, :]


class Tucker(Train):
    def share(self, *tiles: int) -> None:
        bound = 1 / math.sqrt(self.rank)
        self.mixture = nn.Parameter(torch.empty(*tiles, self.rank).uniform_(-bound, bound))

    def cores(self) -> Tensor:
        return torch.einsum("...k,kxy->...xy", self.mixture, self.shared["core"])
