"""Mixture of LoRA experts with a learned router, token by token (LoRAMoE, Dou et al. 2023, arXiv:2312.09979).

A linear layer's answer gains Σ_e g_e(x) s B_e A_e x with s = alpha / rank and g = softmax(x Gᵀ) over the experts, or
over the `top_k` largest of them (MixLoRA, Li et al. 2024, arXiv:2404.15159). A_e is Kaiming-uniform; B_e and G are
zero at the start, so attaching changes no output and all experts begin with equal weight; with a `top_k` below the
number of experts G is drawn like A_e, since equal logits would always choose the same ones.

A router that learns can end with one expert for all tokens; the objective `load-balance` is against that.

For a mixture of adapters that are trained already, blend them: `gw.route(model, names, weights=...)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor, nn

from graftwork.engine.lowrank import low_rank_linear
from graftwork.engine.modules import HiddenModule, top_softmax, uniform, zeros
from graftwork.errors import BadOption
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
from graftwork.reference.site import Kind, Site
from graftwork.reference.technique import Above, AtLeast, Between, Technique


@register
@dataclass(frozen=True, kw_only=True)
class MixtureOfLoRA(Technique, name="mixture-of-lora"):
    """Several low-rank experts beside a linear layer, weighed token by token by a learned router.

    Args:
        experts: their number E.
        rank: of each expert.
        alpha: numerator of the scale alpha / rank.
        top_k: how many experts a token takes; None: all.
        dropout: probability of dropping an element of the experts' input.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.NONLINEAR,
        inter_connectivity=InterConnectivity.DYNAMIC,
        adaptation=Adaptation.ADDITION,
        input=Input.HIDDEN,
        insertion=Insertion.PARALLEL,
        integration=Integration.SCALED_ADDITION,
        workspaces=("feedforward.up|ssm.in|linear", "feedforward.gate?", "feedforward.down|ssm.out?"),
        linear=False,
        identity_at_init=True,
        formula="y = W x + alpha/rank sum_e g_e(x) B_e A_e x,  g = softmax(G x)",
        parameters="E (rank (in + out) + in) per site",
        citation="Dou et al. 2023, LoRAMoE: Revolutionizing Mixture of Experts for Maintaining World Knowledge in "
        "Language Model Alignment, arXiv:2312.09979",
    )

    experts: Annotated[int, AtLeast(2)] = 4
    rank: Annotated[int, AtLeast(1)] = 8
    alpha: Annotated[float, Above(0)] = 16.0
    top_k: Annotated[int | None, AtLeast(1)] = None
    dropout: Annotated[float, Between(0, 1)] = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def fits(self, site: Site) -> bool:
        return site.kind is Kind.LINEAR and not site.read_only

    def build(self, site: Site) -> nn.Module:
        if self.top_k is not None and self.top_k > self.experts:
            raise BadOption(
                f"{self.name}: top_k={self.top_k} of {self.experts} experts; take at most all of them"
            )
        return Experts(self.width_read(site), site.width, self)


class Experts(HiddenModule):
    def __init__(self, width_in: int, width_out: int, chosen: MixtureOfLoRA) -> None:
        super().__init__()
        self.experts, self.takes = chosen.experts, chosen.top_k or chosen.experts
        self.dropout = chosen.dropout
        self.down = uniform(chosen.experts * chosen.rank, width_in)
        self.up = zeros(width_out, chosen.experts * chosen.rank)
        few = self.takes < self.experts
        self.router = uniform(chosen.experts, width_in) if few else zeros(chosen.experts, width_in)

    def scores(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.router.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        weights = top_softmax(self.scores(x), self.takes)
        each = weights.repeat_interleave(len(self.down) // self.experts, dim=-1)
        dropout = self.dropout if self.training else 0.0
        return low_rank_linear(x, None, None, self.down, self.up, 1.0, dropout=dropout, mask=each)
