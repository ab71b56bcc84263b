"""Bottleneck adapter: a narrow MLP behind or beside a sub-layer (Houlsby et al. 2019, arXiv:1902.00751).

The signal h becomes h + s up f(down h). `up` and the biases start at zero, so attaching changes no output;
with `init="near-identity"` both matrices are drawn from a normal of std 0.01, cut at two std (Houlsby).

One module, several papers, told apart by their cards: `houlsby()` behind attention and feed-forward;
`pfeiffer()`, the default (Pfeiffer et al. 2021, arXiv:2005.00247), behind the feed-forward only; `parallel()`
(He et al. 2022, arXiv:2110.04366) and `adaptformer()` (Chen et al. 2022, arXiv:2205.13535) beside it, reading
what it reads. All of them act before the residual is added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from torch import Tensor, nn

from graftwork.engine.modules import HiddenModule, Linear, activation
from graftwork.errors import BadOption
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import Above, AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class BottleneckAdapter(Technique):
    """Pass a signal through a narrow MLP and add the answer.

    Args:
        width: of the bottleneck; None means a sixteenth of the site's width.
        nonlinearity: f.
        scale: s; other than 1 only with `integration="scaled addition"`.
        init: "zero" leaves the host's output as it is, "near-identity" almost so.
        bias: whether both projections have one.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.NONLINEAR,
        adaptation=Adaptation.ADDITION,
        input=Input.HIDDEN,
        insertion=Insertion.SEQUENTIAL,
        integration=Integration.DIRECT_ADDITION,
        workspaces=("feedforward|ssm.out|conv|linear",),
        linear=False,
        identity_at_init=True,
        formula="y = h + s (up f(down h + b) + c); parallel: y = host(x) + s (up f(down x + b) + c)",
        parameters="width (in + out) + width + out per site",
        citation="Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, arXiv:1902.00751",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic({"up.*": Role.SIGNED, "down.*": Role.INNER}, free=("init",))

    width: Annotated[int | None, AtLeast(1)] = None
    nonlinearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    scale: Annotated[float, Above(0)] = 1.0
    init: Literal["zero", "near-identity"] = "zero"
    bias: bool = True

    @classmethod
    def houlsby(cls, width: int | None = None) -> BottleneckAdapter:
        """Two adapters a layer, behind attention and behind the feed-forward."""
        places = ("attention|ssm.out|conv|linear", "feedforward?")
        return cls(width=width, workspaces=places, nonlinearity="gelu", init="near-identity")

    @classmethod
    def pfeiffer(cls, width: int | None = None) -> BottleneckAdapter:
        """One adapter a layer, behind the feed-forward."""
        return cls(width=width)

    @classmethod
    def parallel(cls, width: int | None = 512, scale: float = 4.0) -> BottleneckAdapter:
        """One adapter a layer, beside the feed-forward."""
        form = Insertion.PARALLEL, Integration.SCALED_ADDITION
        return cls(width=width, scale=scale, insertion=form[0], integration=form[1])

    @classmethod
    def adaptformer(cls, width: int | None = 64, scale: float = 0.1) -> BottleneckAdapter:
        """The parallel adapter as vision transformers use it: narrower and fainter."""
        return cls.parallel(width, scale)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale != 1.0 and self.integration is not Integration.SCALED_ADDITION:
            raise BadOption(f"{self.name}: scale={self.scale:g} needs integration='scaled addition'")

    @property
    def card(self) -> Card:
        return replace(super().card, identity_at_init=self.init == "zero")

    def build(self, site: Site) -> nn.Module:
        return Narrow(self.width_read(site), self.width or max(1, site.width // 16), site.width, self)


class Narrow(HiddenModule):
    def __init__(self, width_in: int, width: int, width_out: int, chosen: BottleneckAdapter) -> None:
        super().__init__()
        self.down = Linear(width_in, width, bias=chosen.bias)
        self.up = Linear(width, width_out, bias=chosen.bias)
        self.inner = activation(chosen.nonlinearity)
        for layer in (self.down, self.up):
            if chosen.bias:
                nn.init.zeros_(layer.bias)
            if chosen.init == "near-identity":
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
        if chosen.init == "zero":
            nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor) -> Tensor:
        return self.up(self.inner(self.down(h)))
