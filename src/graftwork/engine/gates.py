"""Gates: how much of a module's answer a row takes, read from the row itself (Mao et al. 2022, arXiv:2110.07577).

B samples, T tokens, C channels
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from graftwork.engine.adapter import stored_tensors
from graftwork.engine.modules import DeltaModule, Gate, HiddenModule, LowRankModule
from graftwork.errors import CardConflict
from graftwork.reference.properties import Integration, Sharing
from graftwork.reference.site import Kind, Site
from graftwork.reference.technique import Technique


class Gated(HiddenModule):
    """A hidden module, or the change of a matrix, behind a gate that reads what it reads."""

    mixes = True

    def __init__(self, inner: nn.Module, width: int, scale: float) -> None:
        super().__init__()
        self.inner = inner
        self.gate = Gate(width)
        self.scale = scale
        self.takes = getattr(inner, "takes", 0)

    def scores(self, x: Tensor) -> Tensor:
        return self.inner.scores(x)  # type: ignore[operator]

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Any]:
        gate = self.gate(x, real)
        return gate.view(-1, *(1,) * (x.dim() - 1)), self._answer(x, real)

    def _answer(self, x: Tensor, real: Tensor | None) -> Any:
        if isinstance(self.inner, LowRankModule) and self.inner.taken() is None:
            down, up = (factor.to(x.dtype) for factor in self.inner.factors())
            read = functional.dropout(x, self.inner.dropout, self.training)
            return self.inner.scale * functional.linear(functional.linear(read, down), up)
        if isinstance(self.inner, DeltaModule):
            return functional.linear(x, self.inner.delta().to(x.dtype))
        mixes = getattr(self.inner, "mixes", False)
        return self.scale * (self.inner(x, real) if mixes else self.inner(x))

    def stored_tensors(self) -> dict[str, Tensor]:
        inner = {f"inner.{name}": tensor for name, tensor in stored_tensors(self.inner).items()}
        return {**inner, "gate.weight": self.gate.weight}


def gated(technique: Technique, site: Site, module: nn.Module) -> nn.Module:
    """The module behind a gate where the card asks for one that the technique does not have by itself.

    Raises:
        CardConflict: a module whose answer no gate can multiply.
    """
    added = technique.integration is Integration.GATED_ADDITION
    if not added or technique.published.integration is Integration.GATED_ADDITION:
        return module
    where = f"{technique.name} at {site.key}: integration='gated addition'"
    if technique.published.sharing is not Sharing.NONE:
        raise CardConflict(f"{where} needs modules of their own; those of this technique share tensors")
    if technique.others() or getattr(module, "span", None) is not None:
        raise CardConflict(f"{where} is for modules that see whole rows and no other adapter")
    if not isinstance(module, DeltaModule | HiddenModule):
        raise CardConflict(
            f"{where} multiplies a change, and a {type(module).__name__} makes none that is added"
        )
    if isinstance(module, DeltaModule) and site.kind is not Kind.LINEAR:
        raise CardConflict(
            f"{where} takes linear layers only; choose workspaces without the {site.kind.value}"
        )
    scale = 1.0 if isinstance(module, DeltaModule) else technique.scale
    return Gated(module, technique.width_read(site), scale)
