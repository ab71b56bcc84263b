"""The lean host: a frozen host keeps less for backward while adapters train.

Gated feed-forwards keep their input and two projections, RMS norms their input, the loss over the vocabulary
nothing of the size of the vocabulary. What is taken over is found by trying: a module is taken only when its own
answer on random input is met. Where a call does not fit (dropout on the adapter, a hook on a projection, another
technique), the host's own forward runs, and a warning says so.

    C channels, F inner channels, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.anatomy.resolve import all_sites
from graftwork.engine import factors
from graftwork.engine.attach import state_of
from graftwork.engine.chunked_loss import chunked_cross_entropy
from graftwork.engine.lean import ACTIVATIONS, Projection, Unfit, gated_feedforward, rms_norm
from graftwork.engine.operations import LinearOperation, operation_of
from graftwork.engine.seat import Seat, seat_of
from graftwork.engine.state import State
from graftwork.engine.swap import base_of, take_seat
from graftwork.engine.weight import flat, is_thin
from graftwork.reference.properties import Port

# Of the answer's size: a few roundings of each precision, below what another activation or norm would differ by.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass
class LeanReport:
    """What the lean host took over, and why the rest was left.

    Attributes:
        taken: part -> number of modules.
        left: module name -> reason.
    """

    taken: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def lean(model: nn.Module, *, feedforward: bool = True, norm: bool = True, loss: bool = True) -> LeanReport:
    """Make an attached model's frozen host keep less for backward; outputs and gradients stay, to rounding.

    Args:
        feedforward: gated feed-forwards (Llama's and kin): activation and product are made anew in backward.
        norm: RMS norms keep only their input.
        loss: with `labels`, while training, the loss over the vocabulary is found chunk by chunk. The output then
            has no logits.

    A part that is False is switched off. Nothing changes where gradients are off.
    """
    state = state_of(model)
    report = LeanReport()
    for wanted, name, part in (
        (feedforward, "feedforward", _feedforwards),
        (norm, "norm", _norms),
        (loss, "loss", _losses),
    ):
        for path, module, run in part(model, state, report):
            seat = take_seat(module, state, path)
            seat.lean = run if wanted else None
            report.taken[name] = report.taken.get(name, 0) + int(wanted)
    return report


Run = Callable[[nn.Module, Seat, type, tuple[Any, ...], dict[str, Any]], Any]
Found = Iterator[tuple[str, nn.Module, Run]]


def _feedforwards(model: nn.Module, state: State, report: LeanReport) -> Found:
    """Modules that own gate, up and down projections and compute down(act(gate(x)) * up(x))."""
    by_parent: dict[str, dict[str, str]] = {}
    for site in all_sites(model):
        role = site.workspace.removeprefix("feedforward.")
        if site.workspace.startswith("feedforward.") and role in ("gate", "up", "down"):
            parent, _, child = site.module.rpartition(".")
            by_parent.setdefault(parent, {})[role] = child
    for parent, roles in by_parent.items():
        module = model.get_submodule(parent)
        if set(roles) != {"gate", "up", "down"}:
            continue
        try:
            names = roles["gate"], roles["up"], roles["down"]
            yield parent, module, _feedforward_run(names, _activation(module, names), state)
        except Unfit as reason:
            report.left[parent] = str(reason)


def _feedforward_run(names: tuple[str, str, str], activation: str, state: State) -> Run:
    def run(
        module: nn.Module, seat: Seat, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        if not torch.is_grad_enabled() or not state.running or kwargs or len(args) != 1:
            raise Unfit("")
        gate, up, down = (_projection(getattr(module, name)) for name in names)
        return gated_feedforward(args[0], gate, up, down, activation)

    return run


def _activation(module: nn.Module, names: tuple[str, str, str]) -> str:
    """The activation with which the lean form gives the module's own answer."""
    projections = [_bare(getattr(module, name)) for name in names]
    weight = projections[0].weight
    x = 3 * torch.randn(4, weight.shape[1], dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        wanted = _plain(module, x)
        gate, up, down = projections
        gaps = {name: _gap(gated_feedforward(x, gate, up, down, name), wanted) for name in ACTIVATIONS}
    nearest = min(gaps, key=gaps.__getitem__)
    if gaps[nearest] > _TOLERANCES[x.dtype]:
        raise Unfit("it is not down(activation(gate(x)) * up(x)) with a known activation")
    return nearest


def _norms(model: nn.Module, state: State, report: LeanReport) -> Found:
    for site in all_sites(model):
        if site.workspace not in ("norm", "norm.final"):
            continue
        module = model.get_submodule(site.module)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = module._parameters.get("weight")
        if isinstance(module, nn.LayerNorm):
            report.left[site.module] = "torch's layer norm keeps only its input already"
        elif weight is None or weight.is_meta or eps is None or not _is_rms(module, weight, eps):
            report.left[site.module] = "it is not weight * x / rms(x)"
        else:
            yield site.module, module, _norm_run(eps)


def _norm_run(eps: float) -> Run:
    def run(
        module: nn.Module, seat: Seat, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        if (
            not torch.is_grad_enabled()
            or kwargs
            or len(args) != 1
            or any(seat.running(port) for port in Port)
        ):
            raise Unfit("")
        weight = module._parameters["weight"]
        assert weight is not None
        return rms_norm(args[0], weight, eps)

    return run


def _is_rms(module: nn.Module, weight: Tensor, eps: float) -> bool:
    x = 3 * torch.randn(2, weight.shape[0], dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        return _gap(rms_norm(x, weight, eps), _plain(module, x)) <= _TOLERANCES[x.dtype]


def _losses(model: Any, state: State, report: LeanReport) -> Found:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not hasattr(type(model), "loss_function"):
        report.left[""] = "the model has no loss over a vocabulary"
        return
    path = next(name for name, module in model.named_modules() if module is head)
    take_seat(head, state, path)
    run = _loss_run(head)
    try:
        _try_loss(model, head, run)
    except (Unfit, RuntimeError, ValueError, TypeError) as reason:
        report.left[""] = f"its loss is not the mean cross-entropy of the next token ({reason})"
        return
    yield "", model, run


def _loss_run(head: nn.Module) -> Run:
    def run(module: Any, seat: Seat, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("labels") is None or not (module.training and torch.is_grad_enabled()):
            raise Unfit("")
        projection = _projection(head)
        head_seat = seat_of(head)
        assert head_seat is not None
        own = module.__dict__.get("_loss_function")
        module._loss_function = _chunked(projection)
        before, head_seat.lean = head_seat.lean, _hand_on
        try:
            out = base.forward(module, *args, **kwargs)
        finally:
            head_seat.lean = before
            del module._loss_function
            if own is not None:
                module._loss_function = own
        if not hasattr(out, "items"):
            return (out[0], None, *out[2:])
        return type(out)(**{key: value for key, value in out.items() if key != "logits"})

    return run


def _hand_on(
    module: nn.Module, seat: Seat, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """The vocabulary projection hands its input on: the loss multiplies chunk by chunk."""
    return args[0]


def _chunked(head: Projection) -> Callable[..., Tensor]:
    def loss(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        factors_ = None if head.down is None or head.up is None else (head.down, head.up, head.scale)
        return chunked_cross_entropy(
            logits, head.weight, shift_labels.to(logits.device), head_bias=head.bias, factors=factors_,
            ignore_index=ignore_index, items=num_items_in_batch,
        )  # fmt: skip

    return loss


def _try_loss(model: Any, head: nn.Module, run: Run) -> None:
    """The loss must be a function of the head's own answer, bit for bit, and agree on a few tokens.

    Agreement alone would not do: a cap on the logits hardly shows while they are small.
    """
    seat = seat_of(model)
    assert seat is not None
    vocabulary = _bare(head).weight.shape[0]
    ids = torch.arange(6, device=_bare(head).weight.device).view(1, 6) * 7 % max(vocabulary, 1)
    was, checks = model.training, (seat.state.unreached, seat.state.ungraded)
    seat.state.unreached = seat.state.ungraded = False
    model.train()
    before, seat.lean = seat.lean, None
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            plain = _own_loss(model, head, ids)
            torch.manual_seed(0)
            seat.lean = run
            chunked = model(input_ids=ids, labels=ids).loss
        if chunked is None or _gap(chunked.detach(), plain.detach()) > _TOLERANCES[_bare(head).weight.dtype]:
            raise Unfit(f"{plain} became {chunked}")
    finally:
        seat.lean = before
        model.train(was)
        seat.state.unreached, seat.state.ungraded = checks


def _own_loss(model: Any, head: nn.Module, ids: Tensor) -> Tensor:
    answers: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, __, out: answers.append(out.detach()))
    own, function = model.__dict__.get("_loss_function"), model.loss_function

    def loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.equal(logits.detach(), answers[-1]):
            raise Unfit("it changes the logits behind the head")
        return function(logits, *args, **kwargs)

    model._loss_function = loss
    try:
        return model(input_ids=ids, labels=ids).loss
    finally:
        handle.remove()
        del model._loss_function
        if own is not None:
            model._loss_function = own


def _projection(module: nn.Module) -> Projection:
    """A projection with the factors of the adapters that run at it; raises Unfit where it is more than that."""
    bare, seat = _bare(module), seat_of(module)
    if module._forward_hooks or module._forward_pre_hooks:
        raise Unfit("a hook is registered on a projection")
    if seat is None or not seat.state.running:
        return bare
    if seat.running(Port.HIDDEN):
        raise Unfit("a hidden module works on a projection")
    running = flat(seat.running(Port.WEIGHT))
    if not running:
        return bare
    if seat.state.route is not None or not all(map(is_thin, running)):
        raise Unfit("the projections carry more than low-rank adapters of the whole batch")
    groups = factors.of_stack(running, module.training)
    if len(groups) > 1 or groups[0].dropout:
        raise Unfit("dropout acts on the adapter's input")
    seat.touch(Port.WEIGHT)
    return Projection(bare.weight, bare.bias, groups[0].down, groups[0].up, groups[0].scale)


def _bare(module: nn.Module) -> Projection:
    operation = operation_of(type(module))
    weight = (
        operation.weight(module, base_of(type(module))) if isinstance(operation, LinearOperation) else None
    )
    if weight is None or weight.is_meta or not weight.is_floating_point():
        raise Unfit(f"{type(module).__name__} does not store a plain weight here")
    return Projection(weight, module._parameters.get("bias"))


def _plain(module: Any, x: Tensor) -> Tensor:
    """The module's own answer, whatever is active."""
    seat = seat_of(module)
    state = None if seat is None else seat.state
    if state is None:
        return module(x)
    before = state.snapshot()
    state.active, state.route = (), None
    try:
        return module(x)
    finally:
        state.active, state.route = before.active, before.route


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference relative to the size of b."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-6))
