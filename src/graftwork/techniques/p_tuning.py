"""P-tuning: a prompt written by a small network (Liu et al. 2021, arXiv:2103.10385).

The embedded sequence X becomes [encoder(embedding) ; X]. The encoder is an MLP of three layers, or two
bidirectional LSTM layers and an MLP of two. Only what it writes is stored: the file holds a prompt as prompt
tuning has it. It is not the identity: attaching changes the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from graftwork.engine.modules import PromptModule
from graftwork.reference.card import Card, Insertions
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Technique
from graftwork.techniques.prompt_tuning import PromptTuning


@register
@dataclass(frozen=True, kw_only=True)
class PTuning(Technique):
    """Put vectors in front of the embedded input that a small network derives from trained ones.

    Args:
        length: number of positions.
        encoder: "mlp" or "lstm".
        hidden: inner width of the encoder (of each direction of the LSTM); None means the embedding width.
        front: before a leading summary position (CLS) too, where it usually stays first.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.NONLINEAR,
        adaptation=Adaptation.ADDITION,
        input=Input.DATA,
        insertion=Insertion.PARALLEL,
        insertions=Insertions.ONE,
        integration=Integration.CONCATENATION,
        workspaces=("encoder.embedding|embedding",),
        linear=False,
        identity_at_init=False,
        token_wise=False,
        formula="X' = [encoder(embedding) ; X]",
        parameters="length x width stored; trained: as many, and the encoder",
        citation="Liu et al. 2021, GPT Understands, Too, arXiv:2103.10385",
    )

    length: Annotated[int, AtLeast(1)] = 20
    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden: Annotated[int | None, AtLeast(1)] = None
    front: bool = False

    def build(self, site: Site) -> nn.Module:
        module = PromptEncoder(self.length, site.width, self.hidden or site.width, self.encoder == "lstm")
        module.front = self.front
        return module

    def stored(self) -> PromptTuning:
        return PromptTuning(
            length=self.length, front=self.front, workspaces=self.workspaces, layers=self.layers
        )


class PromptEncoder(PromptModule):
    def __init__(self, length: int, width: int, hidden: int, recurrent: bool) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width))
        self.lstm = nn.LSTM(width, hidden, num_layers=2, bidirectional=True) if recurrent else None
        inner = 2 * hidden if recurrent else hidden
        first = [] if recurrent else [nn.Linear(width, inner), nn.ReLU()]
        self.mlp = nn.Sequential(*first, nn.Linear(inner, inner), nn.ReLU(), nn.Linear(inner, width))

    def forward(self) -> Tensor:
        signal = self.embedding if self.lstm is None else self.lstm(self.embedding)[0]
        return self.mlp(signal)

    def stored_tensors(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"prompt": self()}
