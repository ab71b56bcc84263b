"""S2FT: train a few whole input units of the output and down projections (Yang et al. 2024, arXiv:2412.06289).

W' = W + P E_S^T: P (out, |S|) trains, E_S picks the input channels S; P starts at zero. Training P is training these
columns of W in place: its gradient is the slice of the full weight gradient, and only the slice of the signal is kept
for backward.

The paper co-permutes the matrices on both sides of a unit (gate, up and down; query, key, value and output), so that
the columns of S lie side by side, and updates them inside the weight. Here the columns are gathered by their index: the
same function, gradient and kept bytes, while the base keeps its order and every bit, so that adapters with different S
can be switched, stacked and routed. What this costs is one product of width |S|.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from graftwork.engine.below import Below
from graftwork.engine.modules import DeltaModule
from graftwork.engine.selected import selected_linear
from graftwork.errors import BadOption
from graftwork.initialisers.selection import READS, Keep, Selection, drawn, ranked
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Kind, Site
from graftwork.reference.statistic import Statistic
from graftwork.reference.technique import AtLeast, Between, Technique


@register
@dataclass(frozen=True, kw_only=True)
class S2FT(Technique):
    """Train whole columns of the matrices that read heads and feed-forward channels.

    Args:
        share: part of each matrix's input units that train (at least one).
        unit: neighbouring channels that are chosen together; the width of a head chooses whole heads.
        selection: "random", or by a norm of each unit: of its columns of the "weight", of its "activation" over
            calibration data, of both multiplied ("product"), of its columns of the "gradient" on such data.
        keep: the units of "largest" or "smallest" norm; smallest activations did best in the paper.
        seed: of the random choice; each site draws its own.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.NONE,
        adaptation=Adaptation.REPARAMETERISATION,
        input=Input.HIDDEN,
        insertion=Insertion.PARALLEL,
        integration=Integration.DIRECT_ADDITION,
        workspaces=("attention.output|ssm.out|conv|linear", "feedforward.down?"),
        linear=True,
        identity_at_init=True,
        formula="W' = W + P E_S^T, with E_S the columns of the identity at S",
        parameters="out * share * in per matrix",
        citation="Yang et al. 2024, S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured "
        "Sparsity, arXiv:2412.06289",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic(
        {"block": Role.CHANGE, "index": Role.FROZEN}, free=("seed", "selection", "keep")
    )

    share: Annotated[float, Between(0, 1, closed=True)] = 0.03
    unit: Annotated[int, AtLeast(1)] = 1
    selection: Selection = "random"
    keep: Keep = "largest"
    seed: Annotated[int, AtLeast(0)] = 0

    def fits(self, site: Site) -> bool:
        return site.weighted and site.kind in (Kind.LINEAR, Kind.CONVOLUTION) and not site.batch

    @property
    def needs_data(self) -> bool:
        return self.selection in READS

    def gathers(self, site: Site) -> Statistic | None:
        return READS[self.selection]() if self.needs_data else None

    def stored(self) -> Technique:
        return replace(self, selection="random") if self.needs_data else self

    def build(self, site: Site) -> nn.Module:
        if site.width_in % self.unit:
            raise BadOption(
                f"s2ft: unit={self.unit} does not divide the {site.width_in} inputs of {site.key}"
            )
        return Columns(site, self)


class Columns(DeltaModule):
    index: Tensor

    def __init__(self, site: Site, technique: S2FT) -> None:
        super().__init__()
        units = site.width_in // technique.unit
        count = max(1, round(technique.share * units))
        if technique.selection == "random":
            chosen = drawn(site, units, count, technique.seed)
        else:
            chosen = ranked(site, units, count, technique.selection, technique.keep)
        first = chosen.sort().values * technique.unit
        index = (first.unsqueeze(1) + torch.arange(technique.unit, device=first.device)).flatten()
        self.register_buffer("index", index)
        self.width = site.width_in
        self.block = nn.Parameter(torch.zeros(site.width_out, len(index)))

    def delta(self) -> Tensor:
        whole = self.block.new_zeros(len(self.block), self.width)
        return whole.index_copy(1, self.index, self.block)

    def added(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.index_select(-1, self.index), self.block.to(x.dtype))

    def answer(self, x: Tensor, below: Below) -> Tensor:
        if not below.bare:
            return below.plus(x, self.added(x))
        return selected_linear(x, below.matrix(), below.bias, self.index, self.block)
