"""What composition works on: adapters as files hold them, and what must be equal before they can be added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from torch import Tensor, nn

from graftwork.adapters.base import differences
from graftwork.adapters.manifest import Manifest, Owner
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import NotComposable, WrongBase
from graftwork.reference.technique import Technique

HEAD = "head"
_ELSEWHERE = ("workspaces", "layers", "insertion", "integration")  # seen in sites and card instead


@dataclass(frozen=True)
class Part:
    """Some of an adapter's techniques, numbered from 0, and the tensors they own."""

    techniques: tuple[Technique, ...]
    tensors: Mapping[Owner, Tensor]

    def keys(self) -> set[str]:
        """Site keys (`shared` for tensors common to sites)."""
        return {owner.key for owner in self.tensors}


@dataclass(frozen=True)
class Operand:
    """One adapter of a sum.

    Attributes:
        label: its name or path, for messages.
        stored: the adapter; never changed.
        model: what it is attached to, whose weights some sums need; None for an adapter from a file.
    """

    label: str
    stored: StoredAdapter
    model: nn.Module | None = None

    @property
    def manifest(self) -> Manifest:
        """What its file says of it."""
        return self.stored.manifest

    def body(self) -> Part:
        """All but the task head."""
        return self._part(head=False)

    def head(self) -> Part:
        """The task head, empty where none was trained with the adapter."""
        return self._part(head=True)

    def _part(self, head: bool) -> Part:
        owned = self.stored.owned()
        bodies = {owner.technique for owner in owned if _workspace(owner.key) != HEAD}
        numbers = [i for i in range(len(self.manifest.techniques)) if (i not in bodies) == head]
        new = {old: i for i, old in enumerate(numbers)}
        tensors = {Owner(new[o.technique], o.key, o.name): t for o, t in owned.items() if o.technique in new}
        return Part(tuple(self.manifest.techniques[i] for i in numbers), tensors)


@dataclass(frozen=True)
class Term:
    """One summand."""

    weight: float
    operand: Operand


def join(body: Part, head: Part) -> Part:
    """Body and head as one adapter, the head last."""
    moved = {Owner(o.technique + len(body.techniques), o.key, o.name): t for o, t in head.tensors.items()}
    return Part((*body.techniques, *head.techniques), {**body.tensors, **moved})


def check_bases(terms: Sequence[Term]) -> None:
    """Raise WrongBase where two adapters were made for different bases."""
    first = terms[0].operand
    for other in (term.operand for term in terms[1:]):
        apart = differences(first.manifest.base, other.manifest.base)
        if apart:
            raise WrongBase(
                f"{first.label!r} and {other.label!r} were made for different bases ({'; '.join(apart)}); only "
                "adapters of one base can be added"
            )


def check_alike(terms: Sequence[Term]) -> None:
    """Raise NotComposable with everything in which two adapters differ: technique, options, targets, shapes."""
    first = terms[0].operand
    for other in (term.operand for term in terms[1:]):
        apart = _apart(first, other)
        if apart:
            raise NotComposable(
                f"{first.label!r} and {other.label!r} cannot be added tensor by tensor: {'; '.join(apart[:6])}. "
                "Adapters of different rank, scale or technique add up as updates of the weights: choose the "
                "method 'concatenation' or 'linear'"
            )


def check_targets(terms: Sequence[Term]) -> None:
    """Raise NotComposable where two adapters change different sites."""
    first = terms[0].operand
    for other in (term.operand for term in terms[1:]):
        apart = _targets(first, other, first.body().keys(), other.body().keys())
        if apart:
            raise NotComposable(f"{first.label!r} and {other.label!r} change different sites: {apart}")


def _apart(a: Operand, b: Operand) -> list[str]:
    one, two = a.body(), b.body()
    names = [tuple(t.name for t in part.techniques) for part in (one, two)]
    if names[0] != names[1]:
        return [f"techniques {' + '.join(names[0])} and {' + '.join(names[1])}"]
    found = [
        line for s, t in zip(one.techniques, two.techniques, strict=True) for line in _options_apart(s, t)
    ]
    targets = _targets(a, b, one.keys(), two.keys())
    found += [targets] if targets else []
    return found or _shapes_apart(one, two)


def _options_apart(one: Technique, two: Technique) -> list[str]:
    compared = [f.name for f in fields(one) if f.name not in (*_ELSEWHERE, *one.arithmetic.free)]
    pairs = [(name, getattr(one, name), getattr(two, name)) for name in compared]
    cards = [(name, getattr(one.card, name), getattr(two.card, name)) for name in (*_ELSEWHERE[2:], "scale")]
    return [f"{one.name}: {name} is {x} and {y}" for name, x, y in pairs + cards if x != y]


def _targets(a: Operand, b: Operand, one: set[str], two: set[str]) -> str:
    only = [(label, sorted(keys)) for label, keys in ((a.label, one - two), (b.label, two - one)) if keys]
    return "; ".join(f"only {label!r} has {_some(keys)}" for label, keys in only)


def _shapes_apart(one: Part, two: Part) -> list[str]:
    names = one.tensors.keys() ^ two.tensors.keys()
    if names:
        return [f"tensors {_some(sorted(f'{owner.key}.{owner.name}' for owner in names))} are in one only"]
    shapes = [(o, tuple(t.shape), tuple(two.tensors[o].shape)) for o, t in one.tensors.items()]
    return [f"{o.key}.{o.name} is {x} and {y}" for o, x, y in shapes if x != y]


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _workspace(key: str) -> str:
    return key.rpartition("/")[2].partition("#")[0]
