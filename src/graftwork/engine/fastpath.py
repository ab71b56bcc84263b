"""torch's transformer encoder has a fast path that skips its submodules; grafted, it stays on the plain one.

A layer takes its fast path only where no submodule has a hook; a stack of layers packs padded batches for it
unless `use_nested_tensor` is off, and packed batches cannot go through the plain path. (Where the fast path
would have put zeros at padded positions, the plain one computes values that nothing reads, as in training.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from graftwork.engine.seat import SEAT, Seat

_PACKS = "use_nested_tensor"


def leave(model: nn.Module, host: nn.Module, seat: Seat) -> None:
    """Keep the layer around a grafted module on its plain path."""
    inside = any(isinstance(module, nn.TransformerEncoderLayer) for _, module in _above(model, seat.path))
    if inside and seat.slow_path is None:
        seat.slow_path = host.register_forward_hook(_do_nothing)


def stacks(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The stacks above a module that would pack padded batches; a seat on each keeps them from it."""
    return [
        (above, module) for above, module in _above(model, path) if isinstance(module, nn.TransformerEncoder)
    ]


def members(base: type) -> dict[str, Any]:
    """Class members of a swapped stack."""
    if not issubclass(base, nn.TransformerEncoder):
        return {}

    def get(self: nn.Module) -> bool:
        return SEAT not in self.__dict__ and self.__dict__[_PACKS]

    def put(self: nn.Module, value: bool) -> None:
        self.__dict__[_PACKS] = value

    return {_PACKS: property(get, put)}


def _above(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    parts = path.split(".")
    for end in range(len(parts)):
        above = ".".join(parts[:end])
        yield above, model.get_submodule(above)


def _do_nothing(module: nn.Module, args: Any, output: Any) -> None:
    return None
