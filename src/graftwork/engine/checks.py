"""Nothing is a silent no-op: after the first forward every running site was met, after the first backward
every trainable tensor of a running adapter has a gradient, and data-parallel training knows each of them. A
module that looks at other positions is not shown the newest one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from graftwork.engine.seat import SEAT, Seat, seat_of
from graftwork.engine.sequence_cache import filled, is_cache
from graftwork.engine.state import State
from graftwork.errors import NoGradient, StateError

_synchronised: WeakKeyDictionary[State, tuple[ReferenceType[nn.Module], tuple[str, ...]]] = (
    WeakKeyDictionary()
)


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
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or not state.running:
        return run(module, seat, base, args, kwargs)
    state.facts.check(module, SEAT, state.adapters.values())
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is not None and torch.is_grad_enabled():
        _check_synchronised(wrapper, state)
    _check_whole(state, args, kwargs)
    if not (state.unreached or state.ungraded):
        return run(module, seat, base, args, kwargs)
    out = run(module, seat, base, args, kwargs)
    if state.unreached:
        _check_reached(module, state)
    if state.ungraded and torch.is_grad_enabled():
        _watch(out, state)
    return out


def _check_whole(state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A cache keeps what the host's own attention needs of earlier positions, and nothing for our modules."""
    looking = (state.adapters[name].looks_back for name in state.running)
    graft = next(filter(None, looking), None)
    if graft is None or not any(is_cache(value) and filled(value) for value in (*args, *kwargs.values())):
        return
    raise StateError(
        f"{graft.technique} ({graft.adapter!r}) at {graft.site.key} looks at earlier positions, but with a filled "
        "cache only the newest are computed, so its answer would be another. Generate with use_cache=False, "
        "or without this adapter"
    )


def _check_synchronised(wrapper: nn.Module, state: State) -> None:
    """DistributedDataParallel notes its tensors when it is made, and averages the gradients of no other."""
    known = _synchronised.get(state)
    if known is not None and known[0]() is wrapper and known[1] == state.training:
        return
    noted = {id(parameter) for parameter in wrapper._module_parameters}  # type: ignore[union-attr]
    unknown = [f"{name}: {key}" for (name, key), p in _trainable(state).items() if id(p) not in noted]
    if unknown:
        raise StateError(
            f"the model was wrapped in DistributedDataParallel before attach, so {len(unknown)} trainable adapter "
            f"tensors ({', '.join(unknown[:2])}, ...) would never be synchronised between processes. Attach or "
            "load first, then wrap the model"
        )
    _synchronised[state] = ref(wrapper), state.training


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
    then = _trainable(state)
    running = [name for name, _ in then if name in state.running]
    if not running:
        return
    tensors = [t for t in _tensors(out) if t.requires_grad]
    if not tensors:
        raise NoGradient(
            f"the model's output needs no gradient although {', '.join(dict.fromkeys(running))} is active "
            "and trainable: no adapter tensor can be trained by it"
        )
    queued: list[bool] = []

    def on_gradient(_: Tensor) -> None:
        if not queued and _accumulates(then.values()):
            queued.append(True)
            engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            # Queued twice: sharded data parallel hands gradients over in a callback of its own, before ours.
            engine.queue_callback(lambda: engine.queue_callback(lambda: _check_gradients(state, then)))

    for tensor in tensors:
        tensor.register_hook(on_gradient)


def _trainable(state: State) -> dict[tuple[str, str], Tensor]:
    """Trainable leaf tensors by (adapter, name), but for adapters this batch's route has no row for."""
    unused = () if state.route is None else [n for n in state.route.names if not state.route.uses(n)]
    return {
        (name, key): parameter
        for name, adapter in state.adapters.items()
        if name not in unused
        for key, parameter in adapter.named_parameters()
        if parameter.requires_grad and parameter.is_leaf
    }


def _accumulates(parameters: Iterable[Tensor]) -> bool:
    """Whether the running backward fills `.grad` (`torch.autograd.grad` does not)."""
    node = torch.autograd.graph.get_gradient_edge(next(iter(parameters))).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch refuses to tell for a leaf that autograd.grad was asked for
        return False


def _check_gradients(state: State, then: dict[tuple[str, str], Tensor]) -> None:
    """Look at the forward's tensors (torch.func may have lent them) and at today's (sharding swaps them)."""
    if not state.ungraded:
        return
    state.ungraded = False
    now = _trainable(state)
    missing = [
        f"{name}: {key}"
        for (name, key), parameter in then.items()
        if parameter.grad is None and now.get((name, key), parameter).grad is None
    ]
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        idle = [name for name in state.adapters if name not in state.running]
        hint = f" (not active: {', '.join(idle)})" if idle else ""
        raise NoGradient(
            f"the first backward gave no gradient to {len(missing)} trainable adapter tensors{hint}: "
            f"{shown}. "
            "Freeze what does not take part (gw.trainable), choose other workspaces, or attach with "
            "verify=False"
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
