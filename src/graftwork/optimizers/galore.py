"""GaLore: AdamW in a low-rank projection of the gradient (Zhao et al. 2024, arXiv:2403.03507)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from graftwork.optimizers.low_rank import LowRankAdamW
from graftwork.optimizers.projection import Svd


class GaLore(LowRankAdamW):
    """Train all of a matrix W (n, m) with moments of rank * max(n, m) numbers in place of n * m.

    At steps 0, T, 2T, ... the basis P is renewed from the leading singular vectors of the gradient; between, the
    gradient's projection R = P^T G is what Adam follows, and W <- W - lr_t * scale * P Adam(R) (algorithm 2 of
    the paper; the shorter side is projected). Moments go on when the basis changes, as in the paper. Decoupled
    weight decay comes after the step, on all of W.

    Args:
        params: groups as for any optimiser; those with a `rank` are projected, the others follow AdamW. Every
            option below can be set per group. `low_rank_groups` makes the groups of a model.
        lr: learning rate.
        eps: added to the root of the second moment.
        refresh_interval: T, steps from one renewal of the basis to the next.
        scale: of the projected step; the paper's runs use 0.25.
        svd: "exact", or "randomized" for large matrices.
        state_bits: 32, or 8: bitsandbytes keeps the moments of projected matrices in a quarter of the bytes.

    Raises:
        BadOption: an option out of range, a rank above the shorter side of a matrix, no group with a rank.
        StateError: sharded parameters, or a gradient that is not finite when the basis is renewed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        refresh_interval: int = 200,
        scale: float = 0.25,
        svd: Svd = "exact",
        state_bits: int = 32,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "refresh_interval": refresh_interval,
                "scale": scale,
                "svd": svd,
                "state_bits": state_bits,
            },
        )
