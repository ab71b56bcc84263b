"""Small singular values (KaSA, Wang et al. 2024, arXiv:2412.06071, L2): sum of their squares.

||U diag(s) Vᵀ||_F² = sum of s_j² where the factors are orthonormal; like KaSA's code this takes the sum itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.errors import NothingMatches
from graftwork.objectives.adapted import kinds, learned
from graftwork.objectives.base import Context, Objective, wide


@dataclass(frozen=True, kw_only=True)
class SingularValues(Objective):
    """For techniques whose modules train a vector `values` between two factors.

    Args:
        averaged: divide by the number of adapted matrices, as KaSA's code does; its paper sums. Weights
            published with the code (KaSA's per-task tables) belong to the average.
    """

    reads_logits = False

    averaged: bool = False

    def __call__(self, context: Context) -> Tensor:
        found = [values for module in context.modules if (values := _values(module)) is not None]
        if not found:
            raise NothingMatches(
                f"{self.name} found no trainable vector `values` in the adapters that run "
                f"({kinds(context.modules)}); it is for techniques such as kasa"
            )
        total = torch.stack([wide(values).square().sum() for values in found]).sum()
        return total / sum(values.shape[:-1].numel() for values in found) if self.averaged else total


def _values(module: nn.Module) -> Tensor | None:
    """(..., R), one vector per matrix; leading axes are those of the factor it stands beside."""
    values, down = learned(module, "values"), getattr(module, "down", None)
    batched = values is not None and isinstance(down, Tensor) and values.shape == down.shape[:-1]
    return values if values is not None and (values.ndim == 1 or batched) else None
