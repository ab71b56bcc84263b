"""Fine-tuning: train the host's own weights, all or some, as an adapter like any other.

Each chosen weight W, bias b and bare parameter (a class token, Mamba's `A_log`) is replaced by a trained copy that
starts equal, so attaching changes no output; the host keeps its own. On top of other adapters, what the copy differs
from the host is added.
`workspaces` and `layers` make it partial fine-tuning. The copies are fp32 beside a host of lower precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from graftwork.engine.modules import WeightModule
from graftwork.errors import PortUnavailable
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Kind, Site
from graftwork.reference.technique import Above, Technique


@register
@dataclass(frozen=True, kw_only=True)
class FineTuning(Technique):
    """Train a copy of each chosen weight and bias in place of the host's.

    Args:
        rate: learning-rate factor, for a head or a few layers trained along with other techniques.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.LINEAR,
        adaptation=Adaptation.REPARAMETERISATION,
        input=Input.WEIGHTS,
        insertion=Insertion.PARALLEL,
        integration=Integration.DIRECT_ADDITION,
        workspaces=("*",),
        linear=True,
        identity_at_init=True,
        formula="y = weight x + bias, both trained from the host's W and b",
        parameters="in x out + out per site: as many as the host has there",
        citation="Howard and Ruder 2018, Universal Language Model Fine-tuning for Text Classification, "
        "arXiv:1801.06146",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic({"*": Role.HOST}, free=("rate",))

    rate: Annotated[float, Above(0)] = 1.0

    def fits(self, site: Site) -> bool:
        return site.weighted and (site.channels is None or self.workspaces is not None)

    def build(self, site: Site) -> nn.Module:
        return Copy(site)

    def tie(self, first: nn.Module, second: nn.Module) -> None:
        """Two sites of one host tensor (tied embeddings) train one copy, as in full fine-tuning."""
        second.weight = first.weight

    def learning_rates(self) -> Mapping[str, float]:
        return {} if self.rate == 1.0 else {"weight": self.rate, "bias": self.rate}


class Copy(WeightModule):
    """The trained copy; a table is kept as rows by width, as hosts store it (and may share it with their output)."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.table = site.kind is Kind.EMBEDDING
        self.weight = _copy(site, site.shape, site.matrix, self.table)
        self.bias = _copy(site, (site.width_out,), site.bias) if site.has_bias else None

    def effective(self, weight: Tensor, base: Tensor) -> Tensor:
        own = (self.weight.mT if self.table else self.weight).to(weight.dtype)
        return own if weight is base else weight + (own - base)

    def effective_bias(self, bias: Tensor, base: Tensor) -> Tensor:
        if self.bias is None:
            return bias
        own = self.bias.to(bias.dtype)
        return own if bias is base else bias + (own - base)


def _copy(
    site: Site, shape: tuple[int, ...], read: Callable[[], Tensor] | None, turned: bool = False
) -> nn.Parameter:
    if read is None:
        raise PortUnavailable(f"{site.key} ({site.module}) cannot be read, so no copy of it can be trained")
    values = torch.empty(shape[::-1] if turned else shape)
    if not values.is_meta:
        values = read().reshape(shape)
        values = (values.mT if turned else values).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(values)
