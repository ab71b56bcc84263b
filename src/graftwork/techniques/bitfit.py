"""BitFit: train the biases and nothing else (Ben Zaken et al. 2021, arXiv:2106.10199).

Each bias b of the host becomes b + delta. `delta` starts at zero, so attaching changes no output. A host that
has no biases, such as Llama, has nothing to train: that is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from graftwork.engine.modules import WeightModule, zeros
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import Technique


@register
@dataclass(frozen=True, kw_only=True)
class BitFit(Technique, name="bitfit"):  # type: ignore[call-arg]
    """Change the bias of every module that has one."""

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.NONE,
        adaptation=Adaptation.REPARAMETERISATION,
        input=Input.WEIGHTS,
        insertion=Insertion.PARALLEL,
        integration=Integration.DIRECT_ADDITION,
        workspaces=("*",),
        linear=True,
        identity_at_init=True,
        formula="y = W x + (b + delta)",
        parameters="out per site with a bias",
        citation="Ben Zaken et al. 2021, BitFit: Simple Parameter-efficient Fine-tuning for "
        "Transformer-based Masked Language-models, arXiv:2106.10199",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic({"delta": Role.CHANGE})

    def fits(self, site: Site) -> bool:
        chosen = self.workspaces is not None
        whole = site.channels is None and site.workspace != "head"  # a task head is trained whole anyway
        return site.has_bias and site.weighted and (chosen or whole)

    def build(self, site: Site) -> nn.Module:
        return BiasDelta(site.width_out)


class BiasDelta(WeightModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.delta = zeros(width)

    def effective_bias(self, bias: Tensor, base: Tensor) -> Tensor:
        return bias + self.delta.to(bias.dtype)
