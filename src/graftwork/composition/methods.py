"""The ways in which adapters become one: `Parameters`, the default, and those on the updates of weights.

The latter take adapters of any rank, alpha and weight technique, at the same sites, and make a LoRA of scale 1.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from graftwork.composition import merging
from graftwork.composition.operands import Part, Term, check_targets
from graftwork.composition.parameters import Parameters
from graftwork.composition.updates import Energy, Update, as_factors, as_lora, concatenated, cut, updates
from graftwork.errors import BadOption, NotComposable, UnknownName, nearest

Merged = tuple[Part, Mapping[str, Energy]]
Weighted = Sequence[tuple[float, Update]]


class Method(Protocol):
    """How the weighted adapters of a sum become one."""

    def merged(self, terms: Sequence[Term]) -> Merged:
        """The body of the new adapter, and site key -> energy, where some was lost by cutting the rank."""
        ...


@dataclass(frozen=True, kw_only=True)
class Concatenation:
    """sum w_i D_i, exactly: factors side by side, so that ranks add up."""

    def merged(self, terms: Sequence[Term]) -> Merged:
        """See `Method`."""
        sums = {key: concatenated([u.times(w) for w, u in parts]) for key, parts in _by_site(terms).items()}
        ranks = sorted({update.rank for update in sums.values()})
        if len(ranks) > 1:
            raise NotComposable(
                f"the ranks add up to {ranks} at different sites, and one LoRA has one rank; choose the method "
                "'linear', which cuts them to one"
            )
        return as_lora(sums, ranks[0], terms[0].operand.body().techniques[0]), {}


@dataclass(frozen=True, kw_only=True)
class ToRank:
    """What is common to the methods that cut their result to a rank by singular values."""

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise BadOption(f"rank={self.rank} must be at least 1")

    def merged(self, terms: Sequence[Term]) -> Merged:
        """See `Method`."""
        by_site = _by_site(terms)
        rank = self.rank or max(update.rank for parts in by_site.values() for _, update in parts)
        found = {key: cut(self.one(key, parts), rank) for key, parts in by_site.items()}
        body = as_lora(
            {key: update for key, (update, _) in found.items()}, rank, terms[0].operand.body().techniques[0]
        )
        return body, {key: energy for key, (_, energy) in found.items()}

    def one(self, key: str, parts: Weighted) -> Update:
        """The merged update of one site, before it is cut."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Linear(ToRank):
    """sum w_i D_i.

    Args:
        rank: of the result; None means the largest among the adapters.
    """

    def one(self, key: str, parts: Weighted) -> Update:
        return concatenated([update.times(weight) for weight, update in parts])


@dataclass(frozen=True, kw_only=True)
class Sparse(ToRank):
    """What is common to the methods that drop values of each update before they merge."""

    density: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise BadOption(f"density={self.density} must lie in (0, 1]")

    def one(self, key: str, parts: Weighted) -> Update:
        changes = torch.stack([update.dense() for _, update in parts])
        weights = torch.tensor([weight for weight, _ in parts], dtype=torch.float64)
        return as_factors(self.merge(key, changes, weights))

    def merge(self, key: str, changes: Tensor, weights: Tensor) -> Tensor:
        """The merged change (O, I) of the changes (n, O, I) at a site."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class MagnitudePruning(Sparse):
    """sum w_i of what is left when each update keeps its largest values.

    Args:
        rank: of the result; None means the largest among the adapters.
        density: share of the values that each update keeps.
    """

    def merge(self, key: str, changes: Tensor, weights: Tensor) -> Tensor:
        return merging.magnitude_pruned(changes, weights, self.density)


@dataclass(frozen=True, kw_only=True)
class TIES(Sparse):
    """Each update keeps its largest values; value by value, those that agree with the sign of the sum are averaged.

    Args:
        rank: of the result; None means the largest among the adapters.
        density: share of the values that each update keeps.
    """

    def merge(self, key: str, changes: Tensor, weights: Tensor) -> Tensor:
        return merging.ties(changes, weights, self.density)


@dataclass(frozen=True, kw_only=True)
class DARE(Sparse):
    """Each update keeps values at random, divided by the density; they are summed, or averaged by sign as in TIES.

    Args:
        rank: of the result; None means the largest among the adapters.
        density: probability that a value is kept.
        seed: of the draw; each site draws its own.
        ties: elect signs and average in place of summing.
    """

    seed: int = 0
    ties: bool = False

    def merge(self, key: str, changes: Tensor, weights: Tensor) -> Tensor:
        generator = Generator().manual_seed(self.seed + zlib.crc32(key.encode()))
        rule = merging.dare_ties if self.ties else merging.dare
        return rule(changes, weights, self.density, generator)


METHODS: dict[str, tuple[type[Method], dict[str, Any]]] = {
    "parameters": (Parameters, {}),
    "concatenation": (Concatenation, {}),
    "linear": (Linear, {}),
    "ties": (TIES, {}),
    "dare-linear": (DARE, {"ties": False}),
    "dare-ties": (DARE, {"ties": True}),
    "magnitude-pruning": (MagnitudePruning, {}),
}


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """A method by its name, as the command line spells it. Raises UnknownName for a name or an option."""
    if name not in METHODS:
        raise UnknownName(f"no method is called {name!r}. {nearest(name, METHODS)}")
    kind, fixed = METHODS[name]
    known = {option.name for option in fields(kind)} - set(fixed)  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise UnknownName(f"the method {name!r} has no option {option!r}. {nearest(option, known)}")
    return kind(**fixed, **options)


def _by_site(terms: Sequence[Term]) -> dict[str, list[tuple[float, Update]]]:
    check_targets(terms)
    found = [updates(term.operand) for term in terms]
    for key in found[0]:
        shapes = {(*u[key].up.shape[:-1], u[key].down.shape[-1]) for u in found}
        if len(shapes) > 1:
            raise NotComposable(f"{key}: updates of shapes {sorted(shapes)} cannot be added")
    return {key: [(t.weight, u[key]) for t, u in zip(terms, found, strict=True)] for key in found[0]}
