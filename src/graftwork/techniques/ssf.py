"""SSF: scale and shift the answer of every operation (Lian et al. 2022, arXiv:2210.08823).

Each chosen signal h becomes scale * h + shift, channel by channel. `scale` starts at one and `shift` at zero,
so attaching changes no output. It merges into the weight and bias of the operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftwork.engine.modules import HiddenModule, zeros
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import Technique


@register
@dataclass(frozen=True, kw_only=True)
class SSF(Technique):
    """Multiply each chosen signal by one trained vector and add another."""

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.NONE,
        adaptation=Adaptation.ADDITION,
        input=Input.HIDDEN,
        insertion=Insertion.SEQUENTIAL,
        integration=Integration.RESCALING,
        workspaces=(
            "attention.query|attention.qkv|ssm.in|conv|linear",
            "attention.key|ssm.out?",
            "attention.value?",
            "attention.output?",
            "cross_attention.*?",
            "feedforward.gate?",
            "feedforward.up?",
            "feedforward.down?",
            "norm?",
            "norm.final?",
        ),
        linear=True,
        identity_at_init=True,
        formula="y = scale * h + shift, channel by channel",
        parameters="2 channels per site",
        citation="Lian et al. 2022, Scaling & Shifting Your Features: A New Baseline for Efficient Model "
        "Tuning, arXiv:2210.08823",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic({"scale": Role.GAIN, "shift": Role.CHANGE})

    def build(self, site: Site) -> nn.Module:
        return ScaleAndShift(site.width)


class ScaleAndShift(HiddenModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = zeros(width)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale.to(h.dtype), self.shift.to(h.dtype)
