"""A route: which adapter serves which sample or token. Prepared once, read by every site.

B samples, T tokens, N adapters of the route
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graftwork.engine.routed import Rows
from graftwork.errors import RouteError


class Route:
    """An immutable assignment of samples (B,) or tokens (B, T) to adapters; -1 is the bare base.

    Args:
        names: adapters the index points into.
        index: integer tensor (B,) or (B, T) with values in [-1, N).
    """

    def __init__(self, names: Sequence[str], index: Tensor) -> None:
        self.names = tuple(names)
        self.index = _checked(self.names, index)
        self.per_token = index.dim() == 2
        self._fitted: dict[tuple[int, int | None], Tensor] = {}
        self._laid: dict[tuple[int, int | None], Rows] = {}
        self._laid_first = Rows.of(self.index, len(self.names))
        self._rows: dict[tuple[int, int | None, str], Tensor] = {}
        self._bare = bool((self.index < 0).any())
        self._used = {name: i for i, name in enumerate(self.names) if bool((self.index == i).any())}

    @property
    def batch(self) -> int:
        """Number of samples (read from the tensor, so that a compiled graph does not fix it)."""
        return self.index.shape[0]

    def leaves_out(self, names: Sequence[str]) -> bool:
        """Whether any sample or token goes to the bare base or to an adapter other than `names`."""
        return self._bare or any(name not in names for name in self._used)

    def uses(self, name: str) -> bool:
        """Whether any sample or token goes to `name` (known on the host, no device synchronisation)."""
        return name in self._used

    def fit(self, batch: int, tokens: int | None) -> Tensor:
        """The index laid out for a signal of `batch` rows (and `tokens` positions, where it has them).

        A batch that is a multiple of the route's repeats each row (beams, windows, flattened tokens): both are
        batch-major. Returns (batch,) or (batch, tokens).
        """
        if torch.compiler.is_compiling():  # a key would fix the batch size in the graph
            return self._lay_out(batch, tokens)
        key = (batch, tokens if self.per_token else None)
        found = self._fitted.get(key)
        if found is None:
            found = self._fitted[key] = self._lay_out(batch, tokens)
        return found

    def layout(self, batch: int, tokens: int | None) -> Rows | None:
        """The route laid out for a signal as `fit` does it, prepared once; None where compiling cannot prepare it."""
        if batch == self.index.shape[0] and (not self.per_token or tokens == self.index.shape[1]):
            return self._laid_first
        if torch.compiler.is_compiling():
            return None
        key = (batch, tokens if self.per_token else None)
        found = self._laid.get(key)
        if found is None:
            found = self._laid[key] = Rows.of(self.fit(batch, tokens), len(self.names))
        return found

    def rows(self, name: str, batch: int, tokens: int | None) -> Tensor:
        """Positions of `name` in the fitted index, flattened: rows of the batch, or tokens of batch x tokens."""
        key = (batch, tokens if self.per_token else None, name)
        found = self._rows.get(key)
        if found is None:
            mask = self.fit(batch, tokens).flatten() == self.names.index(name)
            found = mask.nonzero().squeeze(1)
            self._rows[key] = found
        return found

    def coordinates(
        self, owners: Tensor, batch: int, tokens: int | None, dims: int, layer: int | None
    ) -> Tensor:
        """(B, 1 or T, ..., R) of `dims` dimensions: whether an inner coordinate, of adapter `owners`, is the row's."""
        index = self.fit(batch, tokens)
        return index.view(*index.shape, *(1,) * (dims - index.dim())) == owners

    def _lay_out(self, batch: int, tokens: int | None) -> Tensor:
        return fitted(self.index, self.index.dim(), batch, tokens)

    def __deepcopy__(self, memo: dict[int, object]) -> Route:
        return self


def fitted(table: Tensor, lead: int, batch: int, tokens: int | None) -> Tensor:
    """A table whose first axis counts samples (and, with `lead` 2, the second tokens) for a signal of `batch` rows."""
    size = table.shape[0]
    repeats = batch // size if batch % size == 0 else 0
    if lead == 1:
        if not repeats:
            raise RouteError(f"the route has {size} rows, this site sees a batch of {batch}")
        return table if repeats == 1 else table.repeat_interleave(repeats, dim=0)
    length = table.shape[1]
    if tokens == length and repeats:
        return table if repeats == 1 else table.repeat_interleave(repeats, dim=0)
    if tokens is None and batch == size * length:
        return table.flatten(0, 1)
    raise RouteError(
        f"the route assigns {size} x {length} tokens, this site sees {batch} rows"
        + ("" if tokens is None else f" of {tokens} tokens")
        + ". Route per sample, or give an index that covers every position of this forward"
    )


def _checked(names: tuple[str, ...], index: Tensor) -> Tensor:
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
        raise RouteError("a route index is an integer tensor of shape (batch,) or (batch, tokens)")
    if index.dim() not in (1, 2) or index.numel() == 0:
        raise RouteError(f"a route index has shape (batch,) or (batch, tokens), not {tuple(index.shape)}")
    if len(set(names)) != len(names):
        raise RouteError(f"a route names each adapter once, not {list(names)}")
    low, high = int(index.min()), int(index.max())
    if low < -1 or high >= len(names):
        raise RouteError(
            f"route index {low if low < -1 else high} is outside [-1, {len(names)}) for {list(names)}"
        )
    return index.long()
