"""DoRA: train magnitude and direction of each row of a matrix apart (Liu et al. 2024, arXiv:2402.09353).

V = W + s B A, and W' = m V / |V| with one norm for each output channel. m starts as the norms of V and B at zero, so
attaching changes no output. With an init that takes s B A out of the weight, V is W less what was taken, plus s B A.
The norm counts as a constant in the gradient (the paper, section 4.3). The bias of the host is added after rescaling.

It is never formed: |V_o|^2 = |W_o|^2 + 2 s B_o (W A^T)_o + s^2 B_o (A A^T) B_o^T, with |W_o|^2 computed once, and the
answer is (m / |V|) (W x + s B A x). A channel whose row of W is all zeros keeps magnitude 0 and learns nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.engine.below import Below
from graftwork.engine.modules import WeightModule, planned
from graftwork.engine.rescaled import rescaled
from graftwork.initialisers import INITIALISERS
from graftwork.initialisers.start import register_taken
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.site import Site
from graftwork.techniques.lora import LoRA


@register
@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """LoRA on the direction of each row, and a trained length for it; options as LoRA's."""

    published: ClassVar[Card] = replace(
        LoRA.published,
        formula="W' = m (W + (alpha / rank) B A) / |W + (alpha / rank) B A|, row by row",
        parameters="rank (in + out) + out per matrix",
        citation="Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic(
        {"up": Role.SIGNED, "down": Role.FACTOR, "magnitude": Role.HOST},
        undefined=LoRA.arithmetic.undefined,
        free=("alpha", "stabilised", "dropout", "up_rate", "init", "rho"),
    )

    def fits(self, site: Site) -> bool:
        return site.multiplies

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """The change depends on the weight's rows."""
        return

    def build(self, site: Site) -> nn.Module:
        return Decomposed(site, self)


class Decomposed(WeightModule):
    taken_down: Tensor | None
    taken_up: Tensor | None

    def __init__(self, site: Site, technique: DoRA) -> None:
        super().__init__()
        assert site.matrix is not None
        self.scale, self.dropout = technique.scale, technique.dropout
        start = INITIALISERS[technique.init].start(site, technique.rank_at(site), self.scale)
        self.down, self.up = nn.Parameter(start.down.contiguous()), nn.Parameter(start.up.contiguous())
        register_taken(self, start.taken)
        empty = planned()
        norms = torch.empty(site.shape[:-1]) if empty else _squares(self._direction(site.matrix())).sqrt()
        self.magnitude = nn.Parameter(norms.detach())
        self._known: tuple[tuple[int, int], Tensor] | None = None

    def _direction(self, weight: Tensor) -> Tensor:
        """V (..., O, I)."""
        down, up = self._factors()
        return weight + (up @ down).to(weight.dtype)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """(down, up) with the scale in `up`, and what the start took beside them."""
        if self.taken_down is None or self.taken_up is None:
            return self.down, self.scale * self.up
        down = torch.cat([self.down, self.taken_down], -2)
        return down, torch.cat([self.scale * self.up, -self.taken_up], -1)

    def effective(self, weight: Tensor, base: Tensor) -> Tensor:
        v = self._direction(weight)
        factor = self.magnitude / _squares(v.detach()).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        return v * factor.unsqueeze(-1).to(weight.dtype)

    def answer(self, x: Tensor, below: Below) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        y = below.low_rank(x, self.down, self.up, self.scale, dropout)
        if self.taken_down is not None and self.taken_up is not None:  # never dropped
            inner = functional.linear(x, self.taken_down.to(x.dtype))
            y = y - functional.linear(inner, self.taken_up.to(x.dtype))
        return rescaled(y, self.magnitude / self._lengths(below), below.bias, in_place=below.bare)

    @torch.no_grad()
    def _lengths(self, below: Below) -> Tensor:
        """|V| row by row (O,), from the norms of W and the factors."""
        weight, (down, up) = below.matrix(), self._factors()
        crossed = (weight @ down.to(weight.dtype).mT).to(up.dtype)
        squares = self._squares_of(weight, below.bare) + 2 * (up * crossed).sum(-1)
        squares = squares + ((up @ (down @ down.mT)) * up).sum(-1)
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def _squares_of(self, weight: Tensor, frozen: bool) -> Tensor:
        if not frozen or torch.compiler.is_compiling():
            return _squares(weight)
        key = weight.data_ptr(), weight._version
        if self._known is None or self._known[0] != key:
            self._known = key, _squares(weight)
        return self._known[1]


def _squares(weight: Tensor) -> Tensor:
    """Squared norms of the rows of (..., O, I), summed in fp32 or better."""
    wide = torch.float32 if weight.element_size() < 4 else weight.dtype
    return torch.linalg.vector_norm(weight, dim=-1, dtype=wide).square()
