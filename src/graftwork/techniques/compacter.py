"""Compacter: a bottleneck adapter of hypercomplex layers (Karimi Mahabadi et al. 2021, arXiv:2106.04647).

The signal h becomes h + up f(down h) with f = GELU, where each matrix is sum_k kron(rule_k, outer(left_k,
right_k)), k = 1..order. All modules of the adapter share the (order x order) rules. The factors are applied
one after the other, never as the big matrix. The left factors of `up` and the biases start at zero, so
attaching changes no output; all else starts Glorot-uniform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.engine.modules import HiddenModule, zeros
from graftwork.errors import BadOption
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card, Sharing
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class Compacter(Technique):
    """Pass a signal through a narrow MLP whose matrices are sums of Kronecker products, and add the answer.

    Args:
        order: number of Kronecker terms (n); must divide every width.
        width: of the bottleneck; None means a 32nd of the site's width, rounded to a multiple of `order`.
        bias: whether both layers have one.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.HYPERCOMPLEX,
        adaptation=Adaptation.ADDITION,
        sharing=Sharing.SHARED,
        input=Input.HIDDEN,
        insertion=Insertion.SEQUENTIAL,
        integration=Integration.DIRECT_ADDITION,
        workspaces=("attention|ssm.out|conv|linear", "feedforward?"),
        linear=False,
        identity_at_init=True,
        formula="y = h + up f(down h + b) + c, each matrix = sum_k kron(rule_k, outer(left_k, right_k))",
        parameters="in + 3 width + 2 out per site, order^3 once",
        citation="Karimi Mahabadi et al. 2021, Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, "
        "arXiv:2106.04647",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic(
        {"up.left": Role.SIGNED, "up.bias": Role.SIGNED, "*": Role.INNER}
    )

    order: Annotated[int, AtLeast(1)] = 4
    width: Annotated[int | None, AtLeast(1)] = None
    bias: bool = True

    def build(self, site: Site) -> nn.Module:
        inner = self.width or max(1, site.width // 32 // self.order) * self.order
        widths = self.width_read(site), inner, site.width
        if any(width % self.order for width in widths):
            raise BadOption(f"{self.name}: order={self.order} must divide all of {widths} at {site.key}")
        return Hypercomplex(widths, self)

    def shared(self, sites: Sequence[Site]) -> nn.Module:
        return nn.ParameterDict({"rule": glorot(self.order, self.order, self.order)})


class Hypercomplex(HiddenModule):
    def __init__(self, widths: tuple[int, int, int], chosen: Compacter) -> None:
        super().__init__()
        width_in, width, width_out = widths
        self.down = PHM(width_in, width, chosen)
        self.up = PHM(width, width_out, chosen)
        nn.init.zeros_(self.up.left)

    def adopt(self, shared: nn.ParameterDict) -> None:
        self.shared = shared

    def forward(self, h: Tensor) -> Tensor:
        rule = self.shared["rule"]
        return self.up(functional.gelu(self.down(h, rule)), rule)


class PHM(nn.Module):
    def __init__(self, width_in: int, width_out: int, chosen: Compacter) -> None:
        super().__init__()
        self.left = glorot(chosen.order, width_out // chosen.order, 1)
        self.right = glorot(chosen.order, 1, width_in // chosen.order)
        self.bias = zeros(width_out) if chosen.bias else None

    def forward(self, x: Tensor, rule: Tensor) -> Tensor:
        left, right, rule = (factor.to(x.dtype) for factor in (self.left[..., 0], self.right[:, 0], rule))
        inner = x.unflatten(-1, (len(rule), -1)) @ right.mT  # (..., b, k)
        y = (torch.einsum("kab,...bk->...ak", rule, inner) @ left).flatten(-2)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def glorot(count: int, rows: int, columns: int) -> nn.Parameter:
    """A stack of Glorot-uniform matrices."""
    bound = math.sqrt(6 / (rows + columns))
    return nn.Parameter(torch.empty(count, rows, columns).uniform_(-bound, bound))
