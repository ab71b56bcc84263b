"""Natural GaLore: GaLore on natural gradients (Das 2024, arXiv:2410.16029)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from graftwork.optimizers.fisher import Ring
from graftwork.optimizers.low_rank import Group, LowRankAdamW, State, unchanged
from graftwork.optimizers.projection import Svd


class NaturalGaLore(LowRankAdamW):
    """GaLore whose projected gradient g is replaced by (damping * I + H H^T)^-1 g before Adam.

    H holds the last `history` projected gradients as columns, the current one included: the paper's empirical
    Fisher matrix without its 1/s. It is kept as a ring in the state, fp32: `history` (s, k) with k = rank *
    max(n, m), `history_gram` (s, s) its inner products in fp64, `history_count`. This is s*k numbers per matrix on
    top of GaLore's, which is often more than full AdamW's 2nm.

    Args:
        params, lr, betas, eps, weight_decay, refresh_interval, scale, svd, state_bits: as for `GaLore`.
        damping: lambda; towards infinity the direction becomes GaLore's, towards 0 what recent gradients
            explain is removed from the current one.
        history: s; 0 leaves the natural step out, which is GaLore bit by bit.
        clear_history: forget the history when the basis is renewed. Without it, as published, vectors of the old
            basis stay in it for up to s steps.

    Raises:
        BadOption, StateError: as `GaLore`.
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
        damping: float = 1e-3,
        history: int = 20,
        clear_history: bool = False,
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
                "damping": damping,
                "history": history,
                "clear_history": clear_history,
            },
        )

    def _condition(self, low: Tensor, state: State, group: Group, renewed: bool) -> Tensor:
        if group["history"] == 0:
            return low
        if "history" not in state:
            ring = Ring.empty(group["history"], low.flatten())
        else:
            unchanged("history", len(state["history"]), group)
            ring = Ring(state["history"], state["history_gram"], state["history_count"])
        if renewed and group["clear_history"]:
            ring.clear()
        ring.append(low.flatten())
        state["history"], state["history_gram"] = ring.rows, ring.gram
        state["history_count"] = ring.count
        return ring.natural(group["damping"]).view_as(low)
