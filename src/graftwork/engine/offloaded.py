"""Weights that accelerate keeps elsewhere, in memory or on disk, between a module's calls: stored on meta."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graftwork.errors import PortUnavailable

HOOK = "_hf_hook"


def offloading(hook: Any) -> Any:
    """The hook, or the one among several, that moves weights in and out; None where none does."""
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False):
            return one
    return None


def device_of(model: nn.Module, path: str, found: torch.device) -> torch.device:
    """Where a module computes: where its weight is, or where its weight is brought to."""
    hook = offloading(model.get_submodule(path).__dict__.get(HOOK))
    return found if hook is None or hook.execution_device is None else torch.device(hook.execution_device)


def fetched(module: nn.Module, name: str, stored: Tensor) -> Tensor:
    """A stored parameter, brought in where it is offloaded."""
    hook = offloading(module.__dict__.get(HOOK)) if stored.is_meta else None
    return stored if hook is None else hook.weights_map[name].to(hook.execution_device)


def refuse_whole(model: nn.Module, path: str) -> None:
    """Refuse a site below a module that is offloaded as a whole: its hook would take our tensors along."""
    parts = path.split(".")
    for end in range(len(parts)):
        above = ".".join(parts[:end])
        hook = offloading(model.get_submodule(above).__dict__.get(HOOK))
        if hook is not None and hook.place_submodules:
            raise PortUnavailable(
                f"{path}: {above or 'the model'} is offloaded as a whole (preload_module_classes), and "
                "accelerate would offload the adapter's tensors with it. Give that module a device of its "
                "own in device_map"
            )
