"""What merging makes of one module's parameters, computed in fp32 whatever the storage type.

A weight module is folded by its own definition, f(W). A linear hidden module is known by its answers to the rows of
the weight: integrating them is the forward pass asked at the basis vectors.

    I, O input and output channels; R rank
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graftwork.engine import channels, weight
from graftwork.engine.hidden import integrate
from graftwork.engine.modules import LowRankModule
from graftwork.engine.operations import operation_of
from graftwork.engine.seat import Graft, seat_of, stored_parameter
from graftwork.errors import NotMergeable, StateError
from graftwork.reference.properties import Insertion, Port
from graftwork.reference.site import Kind, Side


def thin(module: nn.Module, grafts: list[Graft]) -> tuple[str, Tensor, Tensor] | None:
    """(parameter, down (R, I), up (O, R)) where all that `grafts` do is to add up @ down to one matrix; else None.

    What an initialiser has taken out is in the pair, negative.
    """
    names = {graft.site.parameter for graft in grafts}
    if len(names) > 1 or not all(map(_adds_a_pair, grafts)):
        return None
    pairs = [pair for graft in grafts for pair in _pairs(graft)]
    down, up = torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], dim=1)
    name = names.pop()
    stored = parameter_of(module, name)
    matrix = operation_of(type(module)).matrix(module, stored)
    viewed = matrix.dim() == 2 and matrix.data_ptr() == stored.data_ptr()
    exact = torch.promote_types(stored.dtype, down.dtype) == down.dtype
    return (name, down, up) if viewed and exact else None


def _adds_a_pair(graft: Graft) -> bool:
    kind = type(graft.module)
    own = issubclass(kind, LowRankModule) and kind.effective is LowRankModule.effective
    return own and weight.is_thin(graft) and graft.site.channels is None


def _pairs(graft: Graft) -> list[tuple[Tensor, Tensor]]:
    module = graft.module
    assert isinstance(module, LowRankModule)
    (down, up), taken = module.factors(), module.taken()
    return [(down, module.scale * up), *([] if taken is None else [(taken[0], -taken[1])])]


def folded(module: nn.Module, path: str, grafts: list[Graft]) -> dict[str, Tensor]:
    """Merged values of those parameters of a module that change, in compute precision and storage layout."""
    operation = operation_of(type(module))
    starts = {g.site.parameter: computed(parameter_of(module, g.site.parameter)) for g in grafts}
    inputs = [g for g in grafts if g.card.port is Port.HIDDEN and g.site.side is Side.INPUT]
    outputs = [g for g in grafts if g.card.port is Port.HIDDEN and g.site.side is Side.OUTPUT]
    weights = [g for g in grafts if g.card.port is Port.WEIGHT]
    out = {
        name: weight.fold(
            operation.matrix(module, start),
            [g for g in weights if g.site.parameter == name and weight.changes_weight(g)],
        )
        for name, start in starts.items()
    }
    if "bias" in starts or module._parameters.get("bias") is None:
        changed = None
    else:
        starts["bias"] = computed(parameter_of(module, "bias"))
        changed = weight.fold(starts["bias"], [g for g in weights if weight.changes_bias(g)], bias=True)
    if inputs or outputs:
        name = grafts[0].site.parameter
        out[name], changed = _fold_hidden(module, path, out[name], changed, inputs, outputs)
    values = {name: operation.native(value, starts[name]) for name, value in out.items()}
    if changed is not None:
        values["bias"] = changed
    return {name: value for name, value in values.items() if not torch.equal(value, starts[name])}


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


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """A parameter as stored; StateError where it is gone."""
    stored = stored_parameter(module, name)
    if stored is None or seat_of(module) is None:
        raise StateError(
            f"{type(module).__name__} has no parameter {name!r} any more; detach and attach again"
        )
    return stored


def computed(stored: Tensor) -> Tensor:
    """The value in the precision that merging computes in."""
    return stored.detach().float() if stored.element_size() < 4 else stored.detach()
