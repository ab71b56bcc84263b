"""How many bytes autograd holds between forward and backward: exact, and the same on tensors without storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class _Held:
    """One tensor that autograd saved; watched weakly, so that graphs already dropped do not count."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(forward: Callable[[], object], leave_out: Iterable[Tensor] = ()) -> int:
    """Bytes kept for backward once `forward` has returned, each storage once.

    Args:
        forward: runs the model and returns what keeps the graph alive (a loss).
        leave_out: tensors that are there anyway (parameters, buffers, inputs); their storages do not count.
    """
    known = {tensor.untyped_storage()._cdata for tensor in leave_out}
    saved: list[weakref.ref[_Held]] = []

    def pack(tensor: Tensor) -> _Held:
        held = _Held(tensor.detach())  # with its history it would keep alive the very graph that saved it
        saved.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        kept = forward()
    alive = [held.tensor.untyped_storage() for ref in saved if (held := ref()) is not None]
    sizes = {storage._cdata: storage.nbytes() for storage in alive if storage._cdata not in known}
    del kept
    return sum(sizes.values())
