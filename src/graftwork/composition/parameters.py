"""Arithmetic on the tensors of adapters, each by the role that its technique declares (Zhang et al. 2023,
arXiv:2306.14870).

For a LoRA the sum is factor by factor, so that (B1 + B2)(A1 + A2) has cross terms, as the paper means it; a weight
multiplies both factors and its sign is carried by one of them. One adapter alone is scaled in its signed factor, so
that its update is multiplied by the weight itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.adapters.manifest import Owner
from graftwork.composition.host import host_value
from graftwork.composition.operands import Part, Term, check_alike
from graftwork.composition.updates import Energy
from graftwork.errors import NotComposable, UnknownName, nearest
from graftwork.reference.arithmetic import Role
from graftwork.reference.technique import Technique

UNSIGNED = (Role.FACTOR, Role.INNER)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Add tensor by tensor. Adapters must agree in technique, targets, shapes and scale.

    Args:
        through: the tensor that carries the sign in place of the technique's own choice, `down` for a LoRA.
    """

    through: str | None = None

    def merged(self, terms: Sequence[Term]) -> tuple[Part, dict[str, Energy]]:
        """The sum's body. Raises NotComposable. No energy is lost by it."""
        check_alike(terms)
        bodies = [term.operand.body().tensors for term in terms]
        techniques = terms[0].operand.body().techniques
        self._check_carrier(techniques)
        sums = {
            owner: self._sum(owner, techniques[owner.technique], terms, [body[owner] for body in bodies])
            for owner in bodies[0]
        }
        return Part(techniques, sums), {}

    def _sum(
        self, owner: Owner, technique: Technique, terms: Sequence[Term], tensors: Sequence[Tensor]
    ) -> Tensor:
        role = self._role(technique, owner)
        weights = [term.weight for term in terms]
        where = f"{technique.name}: {owner.key}.{owner.name}"
        if role is Role.FROZEN:
            return _the_same(tensors, where)
        if role is Role.POINT:
            _check_mean(weights, technique)
        if role in UNSIGNED:
            weights = [abs(weight) for weight in weights] if len(weights) > 1 else [1.0]
        total = weighted(weights, tensors)
        rest = 1 - math.fsum(weights)
        if abs(rest) > 1e-9 and role is Role.GAIN:
            total += rest
        if abs(rest) > 1e-9 and role is Role.HOST:
            total += rest * host_value(terms[0].operand, technique, owner).double()
        return total.to(tensors[0].dtype)

    def _role(self, technique: Technique, owner: Owner) -> Role:
        declared = technique.arithmetic
        reason = declared.reason_against(owner.name)
        if reason is not None:
            raise NotComposable(
                f"{technique.name} adapters cannot be added tensor by tensor: {reason}. Where it changes weights, "
                "the method 'concatenation' or 'linear' adds the updates themselves"
            )
        role = declared.role(owner.name)
        if role is None:
            raise NotComposable(
                f"{technique.name} does not declare how its tensor {owner.name!r} adds up; add it to the "
                "`arithmetic` of the technique"
            )
        if self.through not in declared.carriers() or role not in (Role.SIGNED, Role.FACTOR):
            return role
        return Role.SIGNED if owner.name == self.through else Role.FACTOR

    def _check_carrier(self, techniques: tuple[Technique, ...]) -> None:
        known = {name for technique in techniques for name in technique.arithmetic.carriers()}
        if self.through is not None and self.through not in known:
            kinds = " + ".join(technique.name for technique in techniques)
            raise UnknownName(
                f"no tensor {self.through!r} of {kinds} can carry the sign. {nearest(self.through, known)}"
            )


def weighted(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """The weighted sum in float64; a weight of 0 leaves its tensor out, bit for bit."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for weight, tensor in zip(weights, tensors, strict=True):
        if weight:
            total += weight * tensor.double()
    return total


def _the_same(tensors: Sequence[Tensor], where: str) -> Tensor:
    if not all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
        raise NotComposable(
            f"{where} is frozen and differs: the adapters train different parts of the weight"
        )
    return tensors[0]


def _check_mean(weights: Sequence[float], technique: Technique) -> None:
    if min(weights) < 0 or abs(1 - math.fsum(weights)) > 1e-6:
        shown = ", ".join(f"{weight:g}" for weight in weights)
        raise NotComposable(
            f"{technique.name} has no value that changes nothing, so only means are defined: weights of at least 0 "
            f"that sum to 1, not {shown}"
        )
