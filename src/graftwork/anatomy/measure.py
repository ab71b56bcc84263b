"""What a module is and how wide: kind, matrix and activation widths, read from shapes (meta device too)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.anatomy.walk import children
from graftwork.reference.site import Kind


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Shape facts of one host weight; names and meaning as in `Site`."""

    kind: Kind
    width_in: int
    width_out: int
    channels_in: int
    channels_out: int
    kernel: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    has_bias: bool = False
    channel_axis: int = -1
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def measure(module: nn.Module) -> Measure | None:
    """The measure of a module with a weight that techniques know how to treat, None for any other.

    Linear layers, transformers' `Conv1D`, quantised linears (by `in_features` and `out_features`),
    convolutions, embeddings, and norms: whatever has a one-dimensional `weight` and no children.
    """
    if isinstance(module, nn.Linear):
        return _linear(module, module.in_features, module.out_features)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _convolution(module)
    if isinstance(module, nn.Embedding):
        return _embedding(module)
    weight = tensor(module, "weight")
    if weight is not None and weight.dim() == 2 and _transposed(module):
        return _linear(module, weight.shape[0], weight.shape[1])
    inside, outside = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inside, int) and isinstance(outside, int) and not _host_children(module):
        return _linear(module, inside, outside)
    if (
        weight is not None
        and weight.dim() == 1
        and not _host_children(module)
        and not isinstance(module, nn.PReLU)
    ):
        return _norm(module, weight)
    return None


def measure_parameter(module: nn.Module, name: str) -> Measure | None:
    """The measure of a bare parameter (..., out, in) of a module, None where it is absent or a vector."""
    weight = tensor(module, name)
    if weight is None or weight.dim() < 2:
        return None
    *batch, rows, columns = weight.shape
    return Measure(
        kind=Kind.PARAMETER, width_in=columns, width_out=rows, channels_in=columns, channels_out=rows,
        batch=tuple(batch), has_bias=name == "weight" and tensor(module, "bias") is not None,
        dtype=weight.dtype, device=weight.device,
    )  # fmt: skip


def measure_tensor(stored: Tensor) -> Measure:
    """The measure of a bare parameter of any shape."""
    return Measure(
        kind=Kind.TENSOR, width_in=0, width_out=0, channels_in=0, channels_out=0,
        batch=tuple(stored.shape), dtype=stored.dtype, device=stored.device,
    )  # fmt: skip


def tensor(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer as stored; one that is computed (parametrised) is computed."""
    for store in (module._parameters, module._buffers):
        if isinstance(store.get(name), Tensor):
            return store[name]
    if "parametrizations" in module._modules or name in module.__dict__:
        found = getattr(module, name, None)
        return found if isinstance(found, Tensor) else None
    return None


def _linear(module: nn.Module, inside: int, outside: int) -> Measure:
    return Measure(
        kind=Kind.LINEAR, width_in=inside, width_out=outside, channels_in=inside, channels_out=outside,
        has_bias=tensor(module, "bias") is not None, **_storage(module),
    )  # fmt: skip


def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Measure:
    kernel = tuple(module.kernel_size)
    return Measure(
        kind=Kind.CONVOLUTION,
        width_in=module.in_channels // module.groups * math.prod(kernel), width_out=module.out_channels,
        channels_in=module.in_channels, channels_out=module.out_channels, kernel=kernel,
        has_bias=tensor(module, "bias") is not None, channel_axis=1, **_storage(module),
    )  # fmt: skip


def _embedding(module: nn.Embedding) -> Measure:
    rows, width = module.num_embeddings, module.embedding_dim
    return Measure(
        kind=Kind.EMBEDDING,
        width_in=rows,
        width_out=width,
        channels_in=0,
        channels_out=width,
        **_storage(module),
    )


def _norm(module: nn.Module, weight: Tensor) -> Measure:
    width = weight.shape[0]
    return Measure(
        kind=Kind.NORM, width_in=width, width_out=width, channels_in=width, channels_out=width,
        has_bias=tensor(module, "bias") is not None, channel_axis=_norm_axis(module), **_storage(module),
    )  # fmt: skip


def _norm_axis(module: nn.Module) -> int:
    batch_like = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # instance norms are of the first kind
    first = isinstance(module, batch_like) or getattr(module, "data_format", "") == "channels_first"
    return 1 if first else -1


def _storage(module: nn.Module) -> dict[str, Any]:
    stored = tensor(module, "weight")
    if stored is None:
        stored = next(iter([*module._parameters.values(), *module._buffers.values()]), None)
    return {} if stored is None else {"dtype": stored.dtype, "device": stored.device}


def _transposed(module: nn.Module) -> bool:
    names = ((kind.__module__, kind.__name__) for kind in type(module).__mro__)
    return ("transformers.pytorch_utils", "Conv1D") in names


def _host_children(module: nn.Module) -> bool:
    return next(children(module), None) is not None
