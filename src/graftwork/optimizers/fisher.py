"""The inverse of a damped empirical Fisher matrix, applied to the newest gradient of a short history."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 16  # coordinates that are widened to fp64 at a time


@dataclass
class Ring:
    """The last s vectors and their inner products; the oldest is overwritten.

    Args:
        rows: (s, k), in the order of the slots.
        gram: (s, s) float64.
        count: vectors appended since it was empty or cleared.
    """

    rows: Tensor
    gram: Tensor
    count: int

    @classmethod
    def empty(cls, size: int, like: Tensor) -> Ring:
        """A ring of `size` for vectors such as `like` (k,)."""
        rows = torch.zeros(size, like.numel(), dtype=like.dtype, device=like.device)
        return cls(rows, torch.zeros(size, size, dtype=torch.float64, device=like.device), 0)

    @property
    def length(self) -> int:
        return min(self.count, len(self.rows))

    @property
    def newest(self) -> int:
        """The slot of the vector appended last."""
        return (self.count - 1) % len(self.rows)

    def clear(self) -> None:
        self.count = 0

    def append(self, vector: Tensor) -> None:
        """Take in a vector (k,)."""
        self.count += 1
        self.rows[self.newest] = vector
        products = self.gram.new_zeros(self.length)
        for rows, part in zip(self.rows[: self.length].split(CHUNK, 1), vector.split(CHUNK), strict=True):
            products += rows.double() @ part.double()
        self.gram[self.newest, : self.length] = products
        self.gram[: self.length, self.newest] = products

    def natural(self, damping: float) -> Tensor:
        """(damping * I_k + H H^T)^-1 g for H the vectors as columns and g the newest: (k,).

        Computed as H (damping * I_s + H^T H)^-1 e_g, which is the same because g is a column of H: s unknowns,
        and nothing cancels as in Woodbury's form g/lambda - ... does for a small lambda. The system is solved in
        fp64, as an inner product of long vectors in fp32 is off by more than a usual damping.
        """
        system = self.gram[: self.length, : self.length].clone()
        system.diagonal().add_(damping)
        unit = torch.zeros(self.length, 1, dtype=system.dtype, device=system.device)
        unit[self.newest] = 1
        factor = torch.linalg.cholesky_ex(system)[0]
        weights = torch.cholesky_solve(unit, factor).squeeze(1)
        return weights.to(self.rows.dtype) @ self.rows[: self.length]
