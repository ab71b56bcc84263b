"""Norm tuning: train the gains and biases of the normalisations (Zhao et al. 2023, arXiv:2312.11420).

Each norm's gain, and bias where it has one, is replaced by a trained copy that starts equal, so attaching
changes no output. Every adapter has copies of its own: the host's norms are never edited.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Kind, Site
from graftwork.reference.technique import Technique
from graftwork.techniques.fine_tuning import Copy


@register
@dataclass(frozen=True, kw_only=True)
class NormTuning(Technique):
    """Train a copy of each normalisation's gain and bias in place of the host's."""

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.NONE,
        adaptation=Adaptation.REPARAMETERISATION,
        input=Input.WEIGHTS,
        insertion=Insertion.PARALLEL,
        integration=Integration.DIRECT_ADDITION,
        workspaces=("norm", "norm.final?"),
        linear=True,
        identity_at_init=True,
        formula="y = weight * normalised(x) + bias, both trained from the host's",
        parameters="channels per norm, twice that where it has a bias",
        citation="Zhao et al. 2023, Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM "
        "Finetuning, arXiv:2312.11420",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic({"*": Role.HOST})

    def fits(self, site: Site) -> bool:
        return site.kind is Kind.NORM

    def build(self, site: Site) -> nn.Module:
        return Copy(site)
