"""What the pain tests share: small hosts, adapters that do something, and three ways of counting."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graftwork as gw
from graftwork.testing import tiny, tiny_batch


def llama(**options: object) -> nn.Module:
    return tiny("llama", options)


def batch(host: str = "llama", **options: object) -> dict[str, Tensor]:
    return tiny_batch(host, padding=False, **options)


def stirred(adapter: gw.Adapter, size: float = 0.1, seed: int = 1) -> gw.Adapter:
    """Move every tensor off its start, so that being off shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return adapter


def grafted(
    model: nn.Module, technique: object, name: str = "default", seed: int = 1, **options
) -> gw.Adapter:
    return stirred(gw.attach(model, technique, name=name, **options), seed=seed)


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits.detach()


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the base's own tensors."""
    return {k: v.clone() for k, v in model.state_dict().items() if "grafts" not in k.split(".")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def training(model: nn.Module) -> set[str]:
    """Who trains: names of adapters, and `base` for any tensor of the host."""
    out = {name for name, adapter in gw.adapters(model).items() if adapter.trainable}
    base = [p for key, p in model.named_parameters() if "grafts" not in key.split(".")]
    return out | ({"base"} if any(p.requires_grad for p in base) else set())


def saved_bytes(forward: Callable[[], object], held: Iterable[Tensor]) -> int:
    """Bytes autograd keeps for backward, every storage once, without those of `held` (parameters, inputs)."""
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in known)


def python_calls(action: Callable[[], object]) -> int:
    """How many functions, of Python and of C, an action calls."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


class Operations(TorchDispatchMode):
    """Notes every tensor operation: its name and the shape of its first answer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        shape = tuple(out.shape) if isinstance(out, Tensor) else ()
        self.seen.append((func.overloadpacket.__name__, shape))
        return out

    def count(self, *names: str) -> int:
        return sum(name in names for name, _ in self.seen)
