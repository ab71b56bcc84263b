"""A blend: every sample or token takes a weighted sum of what adapters change.

    y = y_0 + Σ_n w_n (y_n - y_0)

at each port of each site, y_0 the answer there without adapters and y_n the answer with adapter n. For a low-rank delta
this is the sum of the deltas times their weights, for (IA)3 the scaling 1 + Σ w_n (l_n - 1). A row with one weight 1
and the rest 0 is a routed row.

    B samples, T tokens, L layers, N adapters of the blend
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graftwork.engine.route import fitted
from graftwork.errors import RouteError
from graftwork.reference.site import Site


class Blend:
    """Weights of adapters for samples, tokens, or tokens layer by layer; gradients reach the weights.

    Args:
        names: adapters the last axis of the weights stands for.
        weights: floating point (B, N), (B, T, N) or (B, T, L, N); T = 1 serves every token of a sample.
    """

    def __init__(self, names: Sequence[str], weights: Tensor) -> None:
        self.names = tuple(names)
        self.weights = _checked(self.names, weights)
        self.per_token = weights.dim() > 2 and weights.shape[1] > 1

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.weights.shape[0]

    def uses(self, name: str) -> bool:
        """Every adapter of a blend takes part."""
        return name in self.names

    def leaves_out(self, names: Sequence[str]) -> bool:
        """Whether adapters other than `names` have a part."""
        return any(name not in names for name in self.names)

    def layout(self, batch: int, tokens: int | None) -> None:
        """A blend has no rows of one adapter each."""
        return

    def fit(self, batch: int, tokens: int | None, layer: int | None) -> Tensor:
        """Weights for a signal of `batch` rows at a site of one layer: (batch, N), or (batch, tokens, N)."""
        weights = self.weights
        if weights.dim() == 4:
            if layer is None or layer >= weights.shape[2]:
                raise RouteError(
                    f"the blend has weights for {weights.shape[2]} layers, and an adapter sits "
                    + ("outside the layers" if layer is None else f"at layer {layer}")
                    + ". Give weights (batch, tokens, layers, adapters) that count all layers, or none"
                )
            weights = weights[:, :, layer]
        if weights.dim() == 3 and weights.shape[1] == 1:
            weights = weights[:, 0]
        return fitted(weights, weights.dim() - 1, batch, tokens)

    def coordinates(
        self, owners: Tensor, batch: int, tokens: int | None, dims: int, layer: int | None
    ) -> Tensor:
        """(B, 1 or T, ..., R) of `dims` dimensions: the weight of each inner coordinate's adapter."""
        weights = self.fit(batch, tokens, layer).index_select(-1, owners)
        lead, last = weights.shape[:-1], weights.shape[-1]
        return weights.view(*lead, *(1,) * (dims - len(lead) - 1), last)

    def mix(self, base: Tensor, answers: Sequence[tuple[str, Tensor]], site: Site) -> Tensor:
        """y_0 + Σ w_n (y_n - y_0) in the precision of `base` (B, ..., C), the host's answer at `site`."""
        if base.shape[0] == 1 < self.batch:
            base = base.expand(self.batch, *base.shape[1:])
        tokens = base.shape[1] if base.dim() == 3 and site.channel_axis == -1 else None
        weights = self.fit(base.shape[0], tokens, site.layer)
        out = base
        for name, answer in answers:
            own = weights[..., self.names.index(name)].to(base.dtype)
            out = out + own.view(*own.shape, *(1,) * (base.dim() - own.dim())) * (answer - base)
        return out

    def __deepcopy__(self, memo: dict[int, object]) -> Blend:
        return self


def _checked(names: tuple[str, ...], weights: Tensor) -> Tensor:
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise RouteError("weights of a blend are a floating point tensor whose last axis counts the adapters")
    if weights.dim() not in (2, 3, 4) or weights.numel() == 0 or weights.shape[-1] != len(names):
        raise RouteError(
            f"weights of {len(names)} adapters have shape (batch, {len(names)}), (batch, tokens, {len(names)}) or "
            f"(batch, tokens, layers, {len(names)}), not {tuple(weights.shape)}"
        )
    if len(set(names)) != len(names):
        raise RouteError(f"a blend names each adapter once, not {list(names)}")
    if not bool(torch.isfinite(weights.detach()).all()):
        raise RouteError("weights of a blend are finite numbers")
    return weights
