"""AdaLoRA: low-rank updates that share out one budget of rank while they train (Zhang et al. 2023, arXiv:2303.10512).

The host's matrix becomes W + s P diag(E) Q with s = alpha / rank. E starts at zero, P and Q are normal with deviation
0.02 (or Q has the principal directions of the inputs), so attaching changes no output. After each step of the optimiser
the least important triplets of all matrices are cut (their E set to zero), from `rank` on average down to `target_rank`
along a cubic. This happens in any training loop by itself; it needs to know the number of steps. Importances and the
step count are buffers, so that a resumed run goes on where it was. An adapter file holds the result as a LoRA: Q scaled
by E, and P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from graftwork.engine.rank_budget import BudgetSchedule, RankBudget, RankedModule
from graftwork.errors import BadOption
from graftwork.initialisers import INITIALISERS
from graftwork.initialisers.ranked import Initialised
from graftwork.reference.arithmetic import Arithmetic
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import InterConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import Above, AtLeast, Because, Between, Technique, from_options
from graftwork.techniques.lora import LoRA


@register
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Initialised):
    """Update each chosen matrix by a product of rank as high as its importance earns it.

    Args:
        total_steps: steps of the optimiser in the whole training; must be given.
        rank: of each matrix at the start.
        target_rank: of each matrix at the end, on average.
        initial_steps: steps before the first cut.
        final_steps: steps after the last one, in which the choice stays.
        interval: steps from one cut to the next.
        alpha: numerator of the scale; None means `rank` (scale 1).
        dropout: probability of dropping an element of the adapter's input while training.
        beta1, beta2: how much of the smoothed sensitivity, and of its uncertainty, each step keeps.
        init: where Q starts: "gaussian" with deviation 0.02, or "eva".
    """

    example: ClassVar[str] = "total_steps=1000"
    published: ClassVar[Card] = replace(
        LoRA.published,
        inter_connectivity=InterConnectivity.DYNAMIC,
        formula="y = W x + (alpha / rank) P diag(E) Q drop(x)",
        parameters="rank (in + out + 1) per matrix, of which target_rank in rank stay in use",
        citation="Zhang et al. 2023, AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient "
        "Fine-Tuning, arXiv:2303.10512",
    )
    arithmetic: ClassVar[Arithmetic] = LoRA.arithmetic  # of what its file holds

    total_steps: Annotated[int | None, AtLeast(1)] = None
    rank: Annotated[int, AtLeast(1)] = 12
    target_rank: Annotated[int, AtLeast(1)] = 8
    initial_steps: Annotated[int, AtLeast(0)] = 0
    final_steps: Annotated[int, AtLeast(0)] = 0
    interval: Annotated[int, AtLeast(1)] = 1
    alpha: Annotated[float | None, Above(0)] = None
    dropout: Annotated[float, Between(0, 1)] = 0.0
    beta1: Annotated[float, Between(0, 1)] = 0.85
    beta2: Annotated[float, Between(0, 1)] = 0.85
    init: Annotated[Literal["gaussian", "eva"], Because("others lose a part of the weight when cut")] = (
        "gaussian"
    )

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def fits(self, site: Site) -> bool:
        return site.has_matrix

    def build(self, site: Site) -> nn.Module:
        return Triplets(site, self)

    def shared(self, sites: Sequence[Site]) -> nn.Module:
        total, cut = self.total_steps, self.initial_steps + self.final_steps
        if total is None:
            raise BadOption(f"{self.name}: total_steps must be given: the rank is cut over all of them")
        if total <= cut:
            ends = f"initial_steps={self.initial_steps} and final_steps={self.final_steps}"
            raise BadOption(f"{self.name}: total_steps={total} leaves no step between {ends} in which to cut")
        if self.target_rank > self.rank:
            raise BadOption(f"{self.name}: target_rank={self.target_rank} is above rank={self.rank}")
        matrices = sum(torch.Size(site.batch).numel() for site in sites)
        schedule = BudgetSchedule(
            start=self.rank * matrices,
            target=self.target_rank * matrices,
            total=total,
            initial=self.initial_steps,
            final=self.final_steps,
            interval=self.interval,
        )
        return RankBudget(schedule, self.beta1, self.beta2)

    def stored(self) -> Technique:
        where = {"workspaces": self.workspaces, "layers": self.layers}
        return from_options(LoRA, {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout, **where})


class Triplets(RankedModule):
    def __init__(self, site: Site, technique: AdaLoRA) -> None:
        down = 0.02 * torch.randn(*site.batch, technique.rank, site.width_in)
        if technique.needs_data:
            down = INITIALISERS[technique.init].start(site, technique.rank, technique.scale).down
        super().__init__(down, 0.02 * torch.randn(*site.batch, site.width_out, technique.rank))
        self.scale, self.dropout = technique.scale, technique.dropout

    def stored_tensors(self) -> dict[str, Tensor]:
        return {name: t.detach() for name, t in zip(("down", "up"), self.factors(), strict=True)}
