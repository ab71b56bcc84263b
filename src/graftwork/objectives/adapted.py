"""The modules of the adapters that run, and the tensors that objectives find in them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from graftwork.engine.attach import state_of
from graftwork.errors import StateError


def modules_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """Every module of the adapters that run, inner ones too, each once."""
    state = state_of(model)
    placed = [place for name in state.choice().names for place in state.adapters[name].placed]
    return tuple(dict.fromkeys(inner for place in placed for inner in place.graft.module.modules()))


def learned(module: nn.Module, name: str) -> Tensor | None:
    """The module's trainable tensor of that name, or None; StateError where it is sharded."""
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor) or not tensor.requires_grad:
        return None
    if isinstance(tensor, DTensor):
        raise StateError(
            f"an objective reads {name!r} of {type(module).__name__}, which is sharded over the processes; "
            "train with DDP (training.sharding: none), or leave the objective out"
        )
    return tensor


def kinds(modules: Sequence[nn.Module]) -> str:
    """Class names, for an error."""
    return ", ".join(sorted({type(module).__name__ for module in modules})) or "none runs"
