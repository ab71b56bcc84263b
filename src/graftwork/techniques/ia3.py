"""(IA)3: rescale keys, values and the inner feed-forward activation (Liu et al. 2022, arXiv:2205.05638).

Each chosen signal h becomes scale * h, channel by channel. `scale` starts at one, so attaching changes no
output. It merges: into rows of the key and value matrices, into columns of the matrix that reads the inner
activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftwork.engine.modules import HiddenModule
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import Technique


@register
@dataclass(frozen=True, kw_only=True)
class IA3(Technique):
    """Multiply each chosen signal by a trained vector."""

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.NONE,
        adaptation=Adaptation.ADDITION,
        input=Input.HIDDEN,
        insertion=Insertion.SEQUENTIAL,
        integration=Integration.RESCALING,
        workspaces=(
            "attention.key|attention.qkv|ssm.in|conv|linear",
            "attention.value|ssm.out?",
            "cross_attention.key?",
            "cross_attention.value?",
            "feedforward.activation?",
        ),
        linear=True,
        identity_at_init=True,
        formula="y = scale * h, channel by channel",
        parameters="channels per site; 2 key width + inner width per layer",
        citation="Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than "
        "In-Context Learning, arXiv:2205.05638",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic({"scale": Role.GAIN})

    def build(self, site: Site) -> nn.Module:
        return Scale(site.width)


class Scale(HiddenModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, h: Tensor) -> Tensor:
        return self.scale.to(h.dtype)
