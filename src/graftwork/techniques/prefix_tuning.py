"""Prefix tuning: trained keys and values beside those of attention (Li and Liang 2021, arXiv:2101.00190).

A head answers (1 - g) Attn(q, K, V) + g Attn(q, key, value), where g is the share of the softmax that falls
on the trained keys: the same as attending to [key ; K] and [value ; V]. One MLP writes keys and values of all
layers: an embedding and a first layer that all sites share, a last layer for each. With `hidden=None` they
are trained directly. Only keys and values are stored. It is not the identity: attaching changes the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from graftwork.engine.modules import Gate, PrefixModule
from graftwork.reference.card import Card, Sharing
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Technique):
    """Give every attention extra keys and values.

    Args:
        length: number of positions.
        hidden: inner width of the MLP that writes them while training; None trains them directly.
        gated: multiply each row's values by sigmoid(w x), x what the attention reads, averaged over positions
            (padding included); generate with `use_cache=False`, for a cache shows it one position at a time.
        shift_positions: tokens stand this many positions later, as behind a prefix of that length in a cache;
            a relative bias (T5) then sees the prefix at -shift_positions and on.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.NONLINEAR,
        adaptation=Adaptation.ADDITION,
        sharing=Sharing.TIED,
        input=Input.DATA,
        insertion=Insertion.PARALLEL,
        integration=Integration.GATED_ADDITION,
        workspaces=("attention",),
        linear=False,
        identity_at_init=False,
        token_wise=False,
        formula="y = (1 - g) Attn(q, K, V) + g Attn(q, key, value), key, value = last tanh(first embedding)",
        parameters="length (key + value width) per site stored; trained by the MLP: length width + "
        "(width + 1) hidden once, (hidden + 1) (key + value width) per site",
        citation="Li and Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation, "
        "arXiv:2101.00190",
    )

    length: Annotated[int, AtLeast(1)] = 30
    hidden: Annotated[int | None, AtLeast(1)] = 512
    gated: bool = False
    shift_positions: Annotated[int, AtLeast(0)] = 0

    @property
    def card(self) -> Card:
        card = super().card
        if self.hidden is not None:
            return card
        return replace(card, intra_connectivity=IntraConnectivity.EMBEDDING, sharing=Sharing.NONE)

    def fits(self, site: Site) -> bool:
        return site.key_width > 0 and site.value_width > 0

    def build(self, site: Site) -> nn.Module:
        widths = site.key_width, site.value_width
        made = Prefix(self.length, *widths) if self.hidden is None else Written(self.hidden, *widths)
        made.shift_positions = self.shift_positions
        if self.gated:
            made.gate = Gate(site.channels_in)
        return made

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        return None if self.hidden is None else Trunk(self.length, sites[0].key_width, self.hidden)

    def stored(self) -> PrefixTuning:
        return replace(self, hidden=None)


class Prefix(PrefixModule):
    def __init__(self, length: int, key_width: int, value_width: int) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(length, key_width).normal_(std=0.02))
        self.value = nn.Parameter(torch.empty(length, value_width).normal_(std=0.02))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.key, self.value


class Trunk(nn.Module):
    def __init__(self, length: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width))
        self.first = nn.Linear(width, hidden)

    def forward(self) -> Tensor:
        return self.first(self.embedding).tanh()


class Written(PrefixModule):
    def __init__(self, hidden: int, key_width: int, value_width: int) -> None:
        super().__init__()
        self.last = nn.Linear(hidden, key_width + value_width)
        self.widths = [key_width, value_width]

    def adopt(self, shared: nn.Module) -> None:
        self.shared = shared

    def forward(self) -> tuple[Tensor, Tensor]:
        key, value = self.last(self.shared()).split(self.widths, dim=-1)
        return key, value

    def stored_tensors(self) -> dict[str, Tensor]:
        with torch.no_grad():
            key, value = self()
        gate = {name: tensor for name, tensor in self.state_dict().items() if name.startswith("gate.")}
        return {"key": key.contiguous(), "value": value.contiguous(), **gate}
