"""Nothing is a silent no-op: after the first forward every running site was met, after the first backward every
trainable tensor of a running adapter has a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.engine.seat import SEAT, Seat, seat_of
from graftwork.engine.state import State
from graftwork.errors import NoGradient, StateError


def root_call(
    module: nn.Module,
    seat: Seat,
    run: Callable[..., Any],
    base: type,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The model's own forward, watched while a check is due."""
    state = seat.state
    if torch.compiler.is_compiling() or not state.running:
        return run(module, seat, base, args, kwargs)
    state.facts.check(module, SEAT, state.adapters.values())
    if not (state.unreached or state.ungraded):
        return run(module, seat, base, args, kwargs)
    out = run(module, seat, base, args, kwargs)
    if state.unreached:
        _check_reached(module, state)
    if state.ungraded and torch.is_grad_enabled():
        _watch(out, state)
    return out


def _check_reached(model: nn.Module, state: State) -> None:
    state.unreached = False
    missed = []
    seats = [seat for module in model.modules() if (seat := seat_of(module)) is not None]
    for seat in seats:
        missed += [
            f"{grafts[0].site.key} ({seat.path}, {port.value} port)"
            for port in seat.ports
            if port not in seat.touched
            for _, grafts in seat.running(port)
        ]
        seat.touched = frozenset()
    if missed:
        raise StateError(
            "the first forward never came by these sites, so their modules change nothing: "
            + ", ".join(missed[:8])
            + (f" and {len(missed) - 8} more" if len(missed) > 8 else "")
            + ". Choose workspaces that this forward runs, or attach with verify=False"
        )


def _watch(out: Any, state: State) -> None:
    wanted = {name: state.adapters[name] for name in _used(state)}
    trainable = any(p.requires_grad for adapter in wanted.values() for p in adapter.parameters())
    if not trainable:
        return
    tensors = [t for t in _tensors(out) if t.requires_grad]
    if not tensors:
        raise NoGradient(
            f"the model's output needs no gradient although {', '.join(wanted)} is active and trainable: "
            "no adapter tensor can be trained by it"
        )
    queued: list[bool] = []
    idle = frozenset(state.running) - frozenset(wanted)

    def on_gradient(_: Tensor) -> None:
        if not queued:
            queued.append(True)
            engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            # Queued twice: sharded data parallel hands gradients over in a callback of its own, which comes first.
            engine.queue_callback(lambda: engine.queue_callback(lambda: _check_gradients(state, idle)))

    for tensor in tensors:
        tensor.register_hook(on_gradient)


def _used(state: State) -> tuple[str, ...]:
    """Running adapters that some sample really goes to."""
    route = state.route
    return tuple(name for name in state.running if route is None or route.uses(name))


def _check_gradients(state: State, idle: frozenset[str]) -> None:
    """`idle`: adapters of a route that no sample of this batch went to; they are looked at another time."""
    if not state.ungraded:
        return
    state.ungraded = bool(idle)
    missing = [
        f"{name}: {tensor}"
        for name, adapter in state.adapters.items()
        for tensor, parameter in adapter.named_parameters()
        if name not in idle and parameter.requires_grad and parameter.grad is None
    ]
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        off = [name for name in state.adapters if name not in state.running]
        hint = f" (not active: {', '.join(off)})" if off else ""
        raise NoGradient(
            f"the first backward gave no gradient to {len(missing)} trainable adapter tensors{hint}: {shown}. "
            "Freeze what does not take part (gw.trainable), choose other workspaces, or attach with verify=False"
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
