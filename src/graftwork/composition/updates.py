"""What an adapter adds to each weight, as two factors; and factors cut to a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from graftwork.adapters.manifest import Owner
from graftwork.adapters.stored import SHARED
from graftwork.composition.host import placed, with_host
from graftwork.composition.operands import Operand, Part
from graftwork.engine.adapter import Placed
from graftwork.engine.modules import WeightModule
from graftwork.errors import NotComposable
from graftwork.reference.technique import Technique
from graftwork.techniques.lora import LoRA


@dataclass(frozen=True)
class Update:
    """A change of one weight: up (..., O, R) times down (..., R, I), in float64."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Width of the factors."""
        return self.down.shape[-2]

    def dense(self) -> Tensor:
        """The change itself (..., O, I)."""
        return self.up @ self.down

    def times(self, weight: float) -> Update:
        """The change, scaled."""
        return Update(self.down, weight * self.up)


class Energy(NamedTuple):
    """Squared Frobenius norm of a change: what was kept, and the whole."""

    kept: float
    whole: float

    @property
    def share(self) -> float:
        """The part that was kept; 1 of a change of zero."""
        return self.kept / self.whole if self.whole else 1.0


def updates(operand: Operand) -> dict[str, Update]:
    """Site key -> what the adapter adds there. Raises NotComposable where that is no change of a weight.

    A file tells it for techniques that say so (`Technique.update`); of an attached adapter it is known for every
    technique that changes weights.
    """
    body = operand.body()
    if len(body.techniques) != 1:
        kinds = " + ".join(technique.name for technique in body.techniques) or "none"
        raise NotComposable(
            f"{operand.label!r} has {len(body.techniques)} techniques ({kinds}); updates of weights are added for "
            "adapters of one technique"
        )
    by_site: dict[str, dict[str, Tensor]] = {}
    for owner, tensor in body.tensors.items():
        by_site.setdefault(owner.key, {})[owner.name] = tensor
    technique = body.techniques[0]
    if not technique.card.linear:
        raise NotComposable(
            f"{operand.label!r}: no change of weights can stand in for {technique.name} as it is here; compose it with "
            "the method 'parameters'"
        )
    told = {key: technique.update(tensors) for key, tensors in by_site.items() if key != SHARED}
    if all(pair is not None for pair in told.values()):
        return {key: Update(pair[0].double(), pair[1].double()) for key, pair in told.items() if pair}
    return _read(operand, technique)


def _read(operand: Operand, technique: Technique) -> dict[str, Update]:
    if operand.model is None:
        raise NotComposable(
            f"the file of {operand.label!r} ({technique.name}) does not tell what it adds to the weights: attach it "
            "to its base (gw.load) and compose there"
        )
    places = [place for place in placed(operand) if place.graft.technique == technique.name]
    return {place.site.key: _whole(operand, place) for place in places}


@torch.no_grad()
def _whole(operand: Operand, place: Placed) -> Update:
    """f(W) - W, with an identity as its second factor."""
    module, site = place.graft.module, place.site
    if not isinstance(module, WeightModule):
        raise NotComposable(
            f"{operand.label!r}: {place.graft.technique} changes signals, not weights, at {site.key}; compose it "
            "with the method 'parameters'"
        )
    assert operand.model is not None
    site = with_host(operand.model, site)
    assert site.matrix is not None
    base = site.matrix()
    bias = site.bias() if site.bias is not None else None
    if base.dim() < 2 or (bias is not None and not torch.equal(module.effective_bias(bias, bias), bias)):
        raise NotComposable(
            f"{operand.label!r}: {place.graft.technique} changes a bias or a norm at {site.key}, which factors "
            "cannot hold; compose it with the method 'parameters'"
        )
    return as_factors((module.effective(base, base).double() - base.double()).cpu())


def as_factors(change: Tensor) -> Update:
    """A dense change (..., O, I) as factors, exactly: itself and an identity."""
    rows, columns = change.shape[-2:]
    one = torch.eye(min(rows, columns), dtype=change.dtype).expand(*change.shape[:-2], -1, -1)
    return Update(one, change) if columns <= rows else Update(change, one)


def concatenated(parts: Sequence[Update]) -> Update:
    """The sum of changes, exactly: ranks add up."""
    return Update(torch.cat([part.down for part in parts], -2), torch.cat([part.up for part in parts], -1))


def cut(update: Update, rank: int) -> tuple[Update, Energy]:
    """The nearest change of a rank (Eckart and Young 1936), split evenly over both factors, and what it kept.

    A rank above the change's own is filled with zeros.
    """
    left, values, right = _decomposed(update)
    root = values[..., :rank].sqrt()
    down, up = root.unsqueeze(-1) * right[..., :rank, :], left[..., :rank] * root.unsqueeze(-2)
    missing = rank - down.shape[-2]
    if missing > 0:
        down = torch.cat([down, down.new_zeros(*down.shape[:-2], missing, down.shape[-1])], -2)
        up = torch.cat([up, up.new_zeros(*up.shape[:-1], missing)], -1)
    squares = values.square()
    return Update(down, up), Energy(float(squares[..., :rank].sum()), float(squares.sum()))


def _decomposed(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition; of the small core where the factors are thin."""
    if update.rank >= min(update.up.shape[-2], update.down.shape[-1]):
        return torch.linalg.svd(update.dense(), full_matrices=False)
    left, inner = torch.linalg.qr(update.up)
    right, outer = torch.linalg.qr(update.down.mT)
    u, values, v = torch.linalg.svd(inner @ outer.mT, full_matrices=False)
    return left @ u, values, v @ right.mT


def as_lora(found: dict[str, Update], rank: int, like: Technique) -> Part:
    """A LoRA adapter of scale 1 with these updates, at the sites of `like`."""
    where = like.workspaces if isinstance(like, LoRA) else like.card.workspaces
    technique = LoRA(rank=rank, workspaces=where, layers=like.layers)
    tensors = {}
    for key, update in found.items():
        tensors[Owner(0, key, "down")] = update.down.float().contiguous()
        tensors[Owner(0, key, "up")] = update.up.float().contiguous()
    return Part((technique,), tensors)
