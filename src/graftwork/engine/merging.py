"""Merge: fold adapters into the base weights, computed in fp32 whatever the storage type; unmerge puts every bit back.

A weight module is folded by its own definition, f(W). A linear hidden module is known by its answers to the rows of
the weight: integrating them is the forward pass asked at the basis vectors.

    I, O input and output channels
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.engine import channels, weight
from graftwork.engine.attach import require, state_of
from graftwork.engine.hidden import integrate
from graftwork.engine.operations import Operation, operation_of
from graftwork.engine.seat import Graft, seat_of, stored_parameter
from graftwork.engine.state import State
from graftwork.errors import BadOption, NotMergeable, StateError
from graftwork.reference.properties import Insertion, Port
from graftwork.reference.site import Kind, Side


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
    for here in grafts.values():
        for graft in here:
            _refuse_unmergeable(graft)
    split = _tied(model, grafts, tie)
    folded = {
        key: value for path, here in grafts.items() for key, value in _fold_module(model, path, here).items()
    }
    return _store(model, state, chosen, folded, split)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Put the base weights back, bit for bit, and the adapters to where they were."""
    state = state_of(model)
    if not state.merged:
        raise StateError("nothing is merged into this model")
    for (path, name), (original, shared) in state.originals.items():
        module = model.get_submodule(path)
        if shared is not None:
            module._parameters[name] = shared  # type: ignore[assignment]
        else:
            _parameter(module, name).data.copy_(original)
    state.originals, state.merged, state.active = {}, (), state.before_merge


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


def _tied(model: nn.Module, grafts: dict[str, list[Graft]], tie: str) -> set[int]:
    """Weights that modules outside the merge share: refused, or the set of those to split off."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_values_of(parameter), []).append(f"{path}.{name}")
    split: set[int] = set()
    for path, here in grafts.items():
        for graft in here:
            parameter = model.get_submodule(path)._parameters.get(graft.site.parameter)
            if parameter is None:
                continue
            own = f"{path}.{graft.site.parameter}"
            strangers = [
                o for o in owners[_values_of(parameter)] if o != own and not _follows(model, grafts, o, graft)
            ]
            if strangers and tie == "refuse":
                raise NotMergeable(
                    f"{own} is the same tensor as {', '.join(strangers)}; merging would change both. "
                    "Use tie='split' to give it a tensor of its own; save_pretrained then writes a configuration "
                    "without the tie"
                )
            if strangers:
                split.add(_values_of(parameter))
    return split


def _follows(model: nn.Module, grafts: dict[str, list[Graft]], owner: str, graft: Graft) -> bool:
    """Whether another owner of a tensor is the same module, or is changed by one and the same adapter tensor."""
    path = owner.rpartition(".")[0]
    if model.get_submodule(path) is model.get_submodule(graft.site.module):
        return True
    mine = {id(parameter) for parameter in graft.module.parameters()}
    return any(mine & {id(p) for p in other.module.parameters()} for other in grafts.get(path, ()))


def _fold_module(model: nn.Module, path: str, grafts: list[Graft]) -> dict[Key, Tensor]:
    """Merged values of one module's parameters, in compute precision and storage layout."""
    module = model.get_submodule(path)
    operation = operation_of(type(module))
    if operation.packed(module):
        raise NotMergeable(
            f"{path} is stored quantised; merging would requantise what was trained. Load the base in 16 or 32 bit "
            "(graftwork.load onto it) and merge there"
        )
    out: dict[Key, Tensor] = {}
    inputs = [g for g in grafts if g.card.port is Port.HIDDEN and g.site.side is Side.INPUT]
    outputs = [g for g in grafts if g.card.port is Port.HIDDEN and g.site.side is Side.OUTPUT]
    weights = [g for g in grafts if g.card.port is Port.WEIGHT]
    for name in dict.fromkeys(g.site.parameter for g in grafts):
        matrix = operation.matrix(module, _computed(_parameter(module, name)))
        mine = [g for g in weights if g.site.parameter == name and weight.changes_weight(g)]
        out[path, name] = weight.fold(matrix, mine)
    bias = module._parameters.get("bias")
    start = None if bias is None else _computed(bias)
    changed = (
        None
        if start is None
        else weight.fold(start, [g for g in weights if weight.changes_bias(g)], bias=True)
    )
    if inputs or outputs:
        name = grafts[0].site.parameter
        out[path, name], changed = _fold_hidden(module, path, out[path, name], changed, inputs, outputs)
    values = {key: _native(operation, module, key, value) for key, value in out.items()}
    if changed is not None:
        values[path, "bias"] = changed
    return {
        key: value
        for key, value in values.items()
        if not torch.equal(value, _computed(_parameter(module, key[1])))
    }


def _native(operation: Operation, module: nn.Module, key: Key, matrix: Tensor) -> Tensor:
    stored = _parameter(module, key[1])
    return operation.native(matrix, torch.empty_like(stored, dtype=matrix.dtype))


def _fold_hidden(
    module: nn.Module,
    path: str,
    matrix: Tensor,
    bias: Tensor | None,
    inputs: list[Graft],
    outputs: list[Graft],
) -> tuple[Tensor, Tensor | None]:
    """(W', b') of x -> f_out(W f_in(x) + b) for affine f: W' = A_out W A_in, the offsets go to the bias."""
    offset = torch.zeros(
        matrix.shape[-2] if matrix.dim() > 1 else matrix.shape[0], dtype=matrix.dtype, device=matrix.device
    )
    offset = offset if bias is None else bias
    for graft in inputs:
        basis = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        zero = _ask(graft, basis.new_zeros(1, basis.shape[1]), None)
        offset = offset + (matrix @ zero.squeeze(0))
        matrix = matrix @ (_ask(graft, basis, None) - zero).mT
    for graft in outputs:
        matrix, offset = _fold_output(graft, module, path, matrix, offset)
    needs = bias is None and bool(offset.abs().max() > 0) if offset.numel() else False
    if needs:
        raise NotMergeable(
            f"{path} has no bias to take the shift of {', '.join(g.adapter for g in [*inputs, *outputs])}; "
            "serve it attached"
        )
    return matrix, None if bias is None else offset


def _fold_output(
    graft: Graft, module: nn.Module, path: str, matrix: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    if matrix.dim() == 1:  # a norm's gain: exact for integrations that act channel by channel
        if not _channelwise(graft):
            raise NotMergeable(f"{path}: {graft.technique} mixes channels behind a norm; serve it attached")
        zero = _ask(graft, torch.zeros_like(matrix), None)
        return _ask(graft, matrix, None) - zero, _ask(graft, offset, None)
    rows = matrix.mT
    basis = torch.eye(rows.shape[0], dtype=rows.dtype, device=rows.device) if _reads_input(graft) else None
    at_zero = None if basis is None else torch.zeros_like(basis[:1])
    if graft.site.kind is Kind.EMBEDDING:
        scale = float(
            getattr(module, "embed_scale", 1.0)
        )  # of the rows as the host answers them (Gemma, BART)
        return (_ask(graft, rows * scale, basis) / scale).mT, offset
    zero = _ask(graft, torch.zeros_like(rows[:1]), at_zero)
    new_offset = _ask(graft, offset.unsqueeze(0), at_zero).squeeze(0)
    return (_ask(graft, rows, basis) - zero).mT, new_offset


def _reads_input(graft: Graft) -> bool:
    return graft.card.insertion is Insertion.PARALLEL


def _channelwise(graft: Graft) -> bool:
    probe = graft.module(torch.zeros(1, graft.site.channels_out, device=graft.site.device))
    return isinstance(probe, tuple) or graft.card.integration.value == "rescaling"


def _ask(graft: Graft, y: Tensor, x: Tensor | None) -> Tensor:
    """The site's answer when the host answers y (..., O) to x."""
    own = graft.site.channels
    part = y if own is None else channels.take(y, own, -1)
    was = graft.module.training
    graft.module.eval()
    try:
        answer = integrate(graft.card, part, graft.module(part if x is None else x))
    finally:
        graft.module.train(was)
    return answer if own is None else channels.put(y, answer, own, -1)


def _store(
    model: nn.Module, state: State, names: tuple[str, ...], folded: dict[Key, Tensor], split: set[int]
) -> MergeReport:
    for key, value in folded.items():
        if not bool(torch.isfinite(value).all()):
            raise NotMergeable(f"merging makes {'.'.join(key)} infinite or not a number; nothing was changed")
    originals: dict[Key, Any] = {}
    rounding = 0.0
    replaced: dict[int, nn.Parameter | None] = {}
    for (path, name), value in folded.items():
        module = model.get_submodule(path)
        parameter = _parameter(module, name)
        before = parameter.detach().clone()
        apart = _values_of(parameter) in split
        if id(parameter) not in replaced:
            new = (
                nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad)
                if apart
                else None
            )
            replaced[id(parameter)] = new
        elif not apart:  # tied weights that one adapter tensor changes together are written once
            continue
        originals[path, name] = (before, parameter if apart else None)
        if apart:
            module._parameters[name] = replaced[id(parameter)]
        else:
            parameter.data.copy_(value)
        rounding = max(rounding, _rounding(value, _parameter(module, name), before))
    state.originals, state.merged, state.before_merge = originals, tuple(names), state.active
    state.active = tuple(name for name in state.active if name not in names)
    return MergeReport(len(folded), rounding)


def _rounding(exact: Tensor, kept: Tensor, before: Tensor) -> float:
    change = (exact - before.to(exact.dtype)).norm()
    return float((kept.detach().to(exact.dtype) - exact).norm() / change) if change > 0 else 0.0


def _values_of(parameter: Tensor) -> int:
    """What two parameters have in common when writing to one changes the other: their memory, not their names."""
    return parameter.data_ptr() or id(parameter)


def _parameter(module: nn.Module, name: str) -> Tensor:
    stored = stored_parameter(module, name)
    if stored is None or seat_of(module) is None:
        raise StateError(
            f"{type(module).__name__} has no parameter {name!r} any more; detach and attach again"
        )
    return stored


def _computed(stored: Tensor) -> Tensor:
    return stored.detach().float() if stored.element_size() < 4 else stored.detach()
