"""Merge: fold adapters into the base weights, computed in fp32 whatever the storage type; unmerge puts every bit back.

Weights are written one module after another; an error on the way puts back those that are written already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.engine.attach import require, state_of
from graftwork.engine.folding import folded, parameter_of, thin
from graftwork.engine.operations import operation_of
from graftwork.engine.seat import Graft
from graftwork.engine.state import State
from graftwork.errors import BadOption, NotMergeable, StateError
from graftwork.reference.properties import Insertion, Port
from graftwork.reference.site import Kind


@dataclass(frozen=True)
class MergeReport:
    """What merging did.

    Attributes:
        weights: number of base tensors rewritten.
        rounding: largest relative error, over those tensors, that storing the merged value cost
            (norm of the rounding error over the norm of the change); 0 in exact arithmetic.
    """

    weights: int
    rounding: float


Key = tuple[str, str]
Modules = Mapping[str, nn.Module]
Originals = dict[Key, tuple[Tensor, Tensor | None]]
_TINY = torch.finfo(torch.float64).tiny
_CHUNK = 1 << 17  # values whose rounding is measured at a time, while they are still in a processor's cache


@torch.no_grad()
def merge(model: nn.Module, *names: str, tie: str = "refuse") -> MergeReport:
    """Fold adapters (the active ones when none is named) into the base weights, in stacking order.

    Args:
        tie: what to do when a weight is shared with another module (tied embeddings): "refuse", or "split" to give
            the merged module a tensor of its own.

    Raises:
        NotMergeable: a technique that no change of weights can stand in for; nothing is changed then.
    """
    state = state_of(model)
    if tie not in ("refuse", "split"):
        raise BadOption(f"tie={tie!r} is not one of 'refuse', 'split'")
    if state.merged:
        raise StateError(f"{', '.join(state.merged)} is merged already; unmerge first")
    if state.route is not None or state.chosen is not None:
        raise StateError(
            "a route gives each sample or token its own adapter, which one base cannot hold; end the route first "
            "(graftwork.route(model, None)), then name what to merge"
        )
    chosen = names or state.active
    if not chosen:
        raise StateError("no adapter is active; name those to merge")
    grafts = _grafts_by_module(state, chosen)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, here in grafts.items():
        _refuse_packed(modules[path], path)
        for graft in here:
            _refuse_unmergeable(graft)
    folding = _Folding(modules, _tied(modules, grafts, tie))
    try:
        for path, here in grafts.items():
            folding.fold(path, here)
        report = folding.report()
    except BaseException:
        _put_back(modules, folding.originals)
        raise
    state.originals, state.merged, state.before_merge = folding.originals, tuple(chosen), state.active
    state.active = tuple(name for name in state.active if name not in chosen)
    return report


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Put the base weights back, bit for bit, and the adapters to where they were."""
    state = state_of(model)
    if not state.merged:
        raise StateError("nothing is merged into this model")
    _put_back(dict(model.named_modules(remove_duplicate=False)), state.originals)
    state.originals, state.merged, state.active = {}, (), state.before_merge


def _put_back(modules: Modules, originals: Originals) -> None:
    for (path, name), (original, shared) in originals.items():
        module = modules[path]
        if shared is not None:
            module._parameters[name] = shared  # type: ignore[assignment]
        else:
            parameter_of(module, name).data.copy_(original)


def _grafts_by_module(state: State, names: tuple[str, ...]) -> dict[str, list[Graft]]:
    grafts: dict[str, list[Graft]] = {}
    for name in names:
        for place in require(state, name).placed:
            grafts.setdefault(place.site.module, []).append(place.graft)
    return grafts


def _refuse_unmergeable(graft: Graft) -> None:
    where = f"cannot merge {graft.adapter!r} at {graft.site.key}: {graft.technique}"
    port = graft.card.port
    if port is Port.ATTENTION:
        raise NotMergeable(f"{where} adds keys and values, which no weight of the host can stand in for")
    if port is Port.SEQUENCE:
        raise NotMergeable(
            f"{where} adds positions to the sequence, which no weight of the host can stand in for"
        )
    if not graft.card.linear and not _of_rows(graft):
        raise NotMergeable(
            f"{where} is not a linear map of the signal; serve it attached, or choose a linear technique"
        )
    if port is Port.HIDDEN and graft.site.kind is Kind.BLOCK:
        raise NotMergeable(
            f"{where} acts on what a whole layer reads or answers, which has no weight of its own"
        )
    if (
        graft.card.insertion is Insertion.PARALLEL
        and port is Port.HIDDEN
        and graft.site.entry not in (None, graft.site.module)
    ):
        raise NotMergeable(f"{where} bypasses several host modules, so no single weight can take it")


def _of_rows(graft: Graft) -> bool:
    """Whether the answer depends on one row of an embedding table only: any function of it is another table."""
    behind = graft.card.port is Port.HIDDEN and graft.card.insertion is Insertion.SEQUENTIAL
    whole = getattr(graft.module, "span", None) is None
    return behind and whole and graft.card.token_wise and graft.site.kind is Kind.EMBEDDING


def _tied(modules: Modules, grafts: dict[str, list[Graft]], tie: str) -> set[int]:
    """Weights that modules outside the merge share: refused, or the set of those to split off."""
    owners: dict[int, list[Key]] = {}
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_values_of(parameter), []).append((path, name))
    split: set[int] = set()
    for path, here in grafts.items():
        for graft in here:
            parameter = modules[path]._parameters.get(graft.site.parameter)
            sharing = () if parameter is None else owners[_values_of(parameter)]
            own = path, graft.site.parameter
            strangers = [o for o in sharing if o != own and not _follows(modules, grafts, o[0], graft)]
            if strangers and tie == "refuse":
                raise NotMergeable(
                    f"{'.'.join(own)} is the same tensor as {', '.join(map('.'.join, strangers))}; merging would "
                    "change both. Use tie='split' to give it a tensor of its own; save_pretrained then writes a "
                    "configuration without the tie"
                )
            if strangers and parameter is not None:
                split.add(_values_of(parameter))
    return split


def _follows(modules: Modules, grafts: dict[str, list[Graft]], path: str, graft: Graft) -> bool:
    """Whether another owner of a tensor is the same module, or is changed by one and the same adapter tensor."""
    if modules[path] is modules[graft.site.module]:
        return True
    mine = {id(parameter) for parameter in graft.module.parameters()}
    return any(mine & {id(p) for p in other.module.parameters()} for other in grafts.get(path, ()))


def _refuse_packed(module: nn.Module, path: str) -> None:
    if operation_of(type(module)).packed(module):
        raise NotMergeable(
            f"{path} is stored quantised; merging would requantise what was trained. Load the base in 16 or 32 bit "
            "(graftwork.load onto it) and merge there"
        )


class _Folding:
    """A merge under way.

    Attributes:
        originals: what was there before.
    """

    def __init__(self, modules: Modules, split: set[int]) -> None:
        self.originals: Originals = {}
        self._modules, self._split = modules, split
        self._written: dict[int, list[Tensor]] = {}
        self._squares: dict[Key, Tensor] = {}

    def fold(self, path: str, grafts: list[Graft]) -> None:
        """Write a module's merged values."""
        module = self._modules[path]
        pair = thin(module, grafts)
        if pair is not None and _values_of(parameter_of(module, pair[0])) not in self._split:
            self._add((path, pair[0]), *pair[1:])
            return
        for name, value in folded(module, path, grafts).items():
            if _values_of(parameter_of(module, name)) in self._split:
                self._replace((path, name), value)
            elif (before := self._keep((path, name))) is not None:
                self._squares[path, name] = _write(value, parameter_of(module, name).data, before)

    def report(self) -> MergeReport:
        """What was done; NotMergeable where a value is not finite."""
        found = torch.stack([squares.double().cpu() for squares in self._squares.values()] or [torch.ones(2)])
        for key, finite in zip(self._squares, found.isfinite().all(-1).tolist(), strict=False):
            if not finite and not self._stored(key).isfinite().all():
                raise NotMergeable(
                    f"merging makes {'.'.join(key)} infinite or not a number; nothing was changed"
                )
        lost, change = found.nan_to_num().unbind(-1)
        return MergeReport(
            int((change > 0).sum()) if self._squares else 0,
            float((lost / change.clamp(min=_TINY)).max().sqrt()),
        )

    def _stored(self, key: Key) -> Tensor:
        return parameter_of(self._modules[key[0]], key[1])

    def _keep(self, key: Key) -> Tensor | None:
        """A copy of what is there; None where it was written before: one adapter tensor changes tied weights."""
        stored = self._stored(key)
        if _values_of(stored) in self._written:
            return None
        self._written[_values_of(stored)] = [stored]
        self.originals[key] = stored.detach().clone(), None
        return self.originals[key][0]

    def _add(self, key: Key, down: Tensor, up: Tensor) -> None:
        """Add up @ down (O, R) (R, I) in place, rows by rows where the sum must be rounded."""
        if (before := self._keep(key)) is None:
            return
        module, stored = self._modules[key[0]], self._stored(key).data
        operation = operation_of(type(module))
        now = operation.matrix(module, stored)
        change = ((up.mT @ up) * (down @ down.mT)).sum()  # the squared norm of up @ down
        if stored.dtype == up.dtype:
            now.addmm_(up, down)
            self._squares[key] = torch.stack((change * 0, change))  # not a number where the change is none
            return
        lost, old = [], operation.matrix(module, before)
        rows = _rows(now)
        for new, part, factor in zip(now.split(rows), old.split(rows), up.split(rows), strict=True):
            exact = part.to(up.dtype).addmm_(factor, down)
            new.copy_(exact)
            lost.append(torch.linalg.vector_norm(exact.sub_(new.to(up.dtype))).square())
        self._squares[key] = torch.stack((torch.stack(lost).sum(), change))

    def _replace(self, key: Key, value: Tensor) -> None:
        """Give a module a tensor of its own; those with equal values stay tied."""
        old = self._stored(key)
        new = nn.Parameter(torch.empty_like(old), requires_grad=old.requires_grad)
        self._squares[key] = _write(value, new.data, old.detach())
        alike = self._written.setdefault(_values_of(old), [])
        found = next((other for other in alike if torch.equal(other, new)), None)
        if found is None:
            alike.append(found := new)
        self.originals[key] = old, old
        self._modules[key[0]]._parameters[key[1]] = found  # type: ignore[assignment]


def _write(exact: Tensor, stored: Tensor, before: Tensor) -> Tensor:
    """Store a value; returns the squared norms of what rounding lost and of the change."""
    if stored.dtype == exact.dtype:
        return _nothing_lost(stored.copy_(exact))
    squares, rows = [], _rows(exact)
    parts = (torch.atleast_1d(tensor).split(rows) for tensor in (exact, stored, before))
    for new, now, old in zip(*parts, strict=True):
        now.copy_(new)
        squares.append(torch.stack([torch.linalg.vector_norm(other - new) for other in (now, old)]))
    return torch.stack(squares).square().sum(0)


def _nothing_lost(value: Tensor) -> Tensor:
    """The squares of a value stored exactly: 0 and 1 while it is finite."""
    return torch.stack((value.sum() * 0, value.new_ones(())))


def _rows(matrix: Tensor) -> int:
    """How many rows are measured at a time."""
    return max(1, _CHUNK * len(matrix) // max(1, matrix.numel())) if matrix.dim() else 1


def _values_of(parameter: Tensor) -> int:
    """What two parameters have in common when writing to one changes the other: their memory, not their names."""
    return parameter.data_ptr() or id(parameter)
