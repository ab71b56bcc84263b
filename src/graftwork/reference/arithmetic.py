"""How the tensors of a technique add, scale and change sign (Zhang et al. 2023, arXiv:2306.14870).

A technique says it once, as data: each of its tensors plays a role. Whoever composes adapters reads the roles and knows
no technique by name. Sums of adapters have weights w_i; n is the value at which a tensor changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import TypeVar

T = TypeVar("T")


class Role(StrEnum):
    """What a tensor does when adapters are summed.

    CHANGE: the module's change is linear in it; n = 0, sum w_i t_i.
    GAIN: it multiplies; n = 1, sum w_i t_i + (1 - sum w_i).
    HOST: a trained copy of a value of the host, which is n; sum w_i t_i + (1 - sum w_i) n.
    SIGNED: the factor of a product that carries the sign; sum w_i t_i.
    FACTOR: another factor of that product, which could carry the sign instead; sum |w_i| t_i.
    INNER: inside a non-linearity or shared, so that it cannot carry the sign; sum |w_i| t_i.
    POINT: no value of it changes nothing; only means, whose weights are at least 0 and sum to 1.
    FROZEN: not trained; must be the same in all.
    """

    CHANGE = "change"
    GAIN = "gain"
    HOST = "host's copy"
    SIGNED = "signed factor"
    FACTOR = "factor"
    INNER = "inner factor"
    POINT = "mean only"
    FROZEN = "frozen"


@dataclass(frozen=True)
class Arithmetic:
    """The declaration of one technique.

    Attributes:
        roles: a tensor's own name, or a pattern (`down.*`), -> its role; the first that fits counts.
        undefined: the same -> why sums that hold this tensor have no meaning.
        free: options that may differ between adapters of one sum: they shape training, or show elsewhere (in
            shapes, in the card's scale).
    """

    roles: Mapping[str, Role] = field(default_factory=lambda: {"*": Role.POINT})
    undefined: Mapping[str, str] = field(default_factory=dict)
    free: tuple[str, ...] = ()

    def role(self, tensor: str) -> Role | None:
        """The role of a tensor by its own name, None for one that is not declared."""
        return _first(self.roles, tensor)

    def reason_against(self, tensor: str) -> str | None:
        """Why sums that hold this tensor are undefined, None where they are not."""
        return _first(self.undefined, tensor)

    def words(self) -> str:
        """One line for people."""
        roles = [f"{name}: {role.value}" for name, role in self.roles.items() if name not in self.undefined]
        return ", ".join(roles) + "".join(
            f"{'; ' if roles else ''}{name}: refused, {reason}" for name, reason in self.undefined.items()
        )

    def carriers(self) -> tuple[str, ...]:
        """Tensors that can carry the sign, the declared one first."""
        order = (Role.SIGNED, Role.FACTOR)
        return tuple(name for role in order for name, own in self.roles.items() if own is role)


def _first(declared: Mapping[str, T], tensor: str) -> T | None:
    return next((value for pattern, value in declared.items() if fnmatchcase(tensor, pattern)), None)
