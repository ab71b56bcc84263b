"""What the engine must know of a host operation: its weight as a matrix, and how to add a low-rank delta to it.

I, O input and output channels (for a convolution I counts in_channels / groups x kernel), R rank
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.engine.factors import Factors
from graftwork.engine.lowrank import low_rank_embedding, low_rank_linear
from graftwork.engine.seat import stored_parameter


class Operation:
    """Any module with parameters: dense definition only, matrices in the parameter's own shape."""

    def matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        """The stored parameter as (..., O, I), a view where possible."""
        return stored

    def native(self, matrix: Tensor, stored: Tensor) -> Tensor:
        """A matrix in storage layout and precision."""
        return matrix.reshape(stored.shape).to(stored.dtype)

    def thin(self, module: nn.Module, base: type) -> bool:
        """Whether a low-rank delta can be run by its factors here."""
        return False

    def direct(self, module: nn.Module, base: type) -> Tensor | None:
        """The (O, I) weight where the whole operation is x Wᵀ + b with it, else None."""
        return None

    def linear(self, module: nn.Module, base: type) -> bool:
        """Whether the answer to x (..., I) is x Wᵀ + b, so that a module may answer without a dense weight."""
        return False

    def packed(self, module: nn.Module) -> bool:
        """Whether the weight is stored in a packed form that `forward` cannot be handed a substitute for."""
        return False

    def fused(self, module: nn.Module, base: type, x: Tensor, groups: tuple[Factors, ...]) -> Tensor | None:
        """Base product and deltas in one function, None where that is not possible."""
        return None

    def add(self, module: nn.Module, base: type, x: Tensor, y: Tensor, groups: tuple[Factors, ...]) -> Tensor:
        """y plus the deltas' answers to x."""
        raise NotImplementedError

    def dense(self, module: nn.Module, x: Tensor, values: dict[str, Tensor]) -> Tensor:
        """The operation with an explicit weight, for packed modules."""
        raise NotImplementedError

    def rows(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the matrix multiplies, one row for each time it is applied: (N, I) of the input x."""
        raise NotImplementedError

    def tokens(self, x: Tensor) -> int | None:
        """How many positions each row of the input has, None where rows are not sequences."""
        return x.shape[1] if x.dim() == 3 else None

    def answer_dims(self, x: Tensor) -> int:
        """Number of dimensions of the answer to x."""
        return x.dim()


class LinearOperation(Operation):
    """`nn.Linear` and its subclasses."""

    def thin(self, module: nn.Module, base: type) -> bool:
        return True

    def rows(self, module: nn.Module, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def linear(self, module: nn.Module, base: type) -> bool:
        return True

    def weight(self, module: nn.Module, base: type) -> Tensor | None:
        """The (O, I) weight that may be multiplied directly, None where only the base's forward knows how."""
        if base.forward is not nn.Linear.forward:  # type: ignore[attr-defined]
            return None
        return module._parameters.get("weight")

    def direct(self, module: nn.Module, base: type) -> Tensor | None:
        weight = self.weight(module, base)
        return None if weight is None or weight.is_meta or not weight.is_floating_point() else weight

    def fused(self, module: nn.Module, base: type, x: Tensor, groups: tuple[Factors, ...]) -> Tensor | None:
        weight = self.direct(module, base)
        if weight is None:
            return None
        first, *rest = groups
        y = low_rank_linear(
            x, weight, module._parameters.get("bias"), first.down, first.up, first.scale,
            dropout=first.dropout, mask=first.mask,
        )  # fmt: skip
        return self.add(module, base, x, y, tuple(rest)) if rest else y

    def add(self, module: nn.Module, base: type, x: Tensor, y: Tensor, groups: tuple[Factors, ...]) -> Tensor:
        for group in groups:
            delta = low_rank_linear(
                x, None, None, group.down, group.up, group.scale, dropout=group.dropout, mask=group.mask
            )
            y = y + delta.to(y.dtype)
        return y


class TransposedOperation(LinearOperation):
    """transformers' `Conv1D`: a linear layer that stores its weight as (I, O)."""

    def matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        return stored.mT

    def native(self, matrix: Tensor, stored: Tensor) -> Tensor:
        return matrix.mT.to(stored.dtype)

    def weight(self, module: nn.Module, base: type) -> Tensor | None:
        stored = module._parameters.get("weight")
        return None if stored is None else stored.mT


class QuantisedOperation(LinearOperation):
    """bitsandbytes linears: the base product is theirs, a dense technique works on the dequantised weight."""

    def weight(self, module: nn.Module, base: type) -> Tensor | None:
        return None

    def packed(self, module: nn.Module) -> bool:
        return True

    def matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        return dequantised(module, stored)

    def native(self, matrix: Tensor, stored: Tensor) -> Tensor:
        return matrix

    def dense(self, module: nn.Module, x: Tensor, values: dict[str, Tensor]) -> Tensor:
        stored = stored_parameter(module, "weight")
        assert stored is not None
        weight = values.get("weight")
        weight = dequantised(module, stored) if weight is None else weight
        bias = values.get("bias", module._parameters.get("bias"))
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class ConvolutionOperation(Operation):
    """Convolutions of one to three dimensions, grouped or not; the matrix is (O, I / groups x kernel)."""

    def matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def thin(self, module: nn.Module, base: type) -> bool:
        return hasattr(module, "_conv_forward") and base.forward in _CONVOLUTIONS  # type: ignore[attr-defined]

    def rows(self, module: Any, x: Tensor) -> Tensor:
        count = module.in_channels // module.groups
        width = count * math.prod(module.kernel_size)
        each = torch.eye(width, dtype=x.dtype, device=x.device).unflatten(1, (count, *module.kernel_size))
        patches = module._conv_forward(x, each.repeat(module.groups, *(1,) * (each.dim() - 1)), None)
        return patches.flatten(2).unflatten(1, (module.groups, width)).mT.reshape(-1, width)  # type: ignore[no-any-return]

    def add(self, module: Any, base: type, x: Tensor, y: Tensor, groups: tuple[Factors, ...]) -> Tensor:
        for group in groups:
            y = y + self._answer(module, x, group)
        return y

    def _answer(self, module: Any, x: Tensor, group: Factors) -> Tensor:
        """Convolve to R channels in each group with the host's own kernel, stride and padding, then mix 1 x 1."""
        kernel, count = module.kernel_size, module.groups
        down = group.down.to(x.dtype).unflatten(1, (module.in_channels // count, *kernel))
        if group.dropout:
            x = functional.dropout(x, group.dropout)
        inner = module._conv_forward(x, torch.cat([down] * count) if count > 1 else down, None)
        if group.mask is not None:
            ones = (1,) * len(kernel)  # (B, 1, ..., R) -> (B, groups x R, 1, ...)
            mask = group.mask.to(x.dtype).reshape(group.mask.shape[0], -1, *ones)
            inner = inner * mask.repeat(1, count, *ones)
        up = (group.up.to(x.dtype) * group.scale)[(...,) + (None,) * len(kernel)]
        mix = (functional.conv1d, functional.conv2d, functional.conv3d)[len(kernel) - 1]
        return mix(inner, up, groups=count)

    def tokens(self, x: Tensor) -> int | None:
        return None


class EmbeddingOperation(Operation):
    """A table of rows; its matrix is (width, rows), so that row j is the answer to basis vector j."""

    def matrix(self, module: nn.Module, stored: Tensor) -> Tensor:
        return stored.mT

    def native(self, matrix: Tensor, stored: Tensor) -> Tensor:
        return matrix.mT.to(stored.dtype)

    def thin(self, module: nn.Module, base: type) -> bool:
        return base.forward is nn.Embedding.forward  # type: ignore[attr-defined]

    def tokens(self, x: Tensor) -> int | None:
        return x.shape[1] if x.dim() > 1 else None

    def answer_dims(self, x: Tensor) -> int:
        return x.dim() + 1

    def add(self, module: nn.Module, base: type, x: Tensor, y: Tensor, groups: tuple[Factors, ...]) -> Tensor:
        for group in groups:
            if group.mask is not None or group.dropout:
                inner = functional.embedding(x, group.down.mT)
                inner = inner if group.mask is None else inner * group.mask
                inner = functional.dropout(inner, group.dropout) if group.dropout else inner
                y = y + (group.scale * (inner @ group.up.mT)).to(y.dtype)
            else:
                y = y + low_rank_embedding(x, group.down, group.up, group.scale).to(y.dtype)
        return y


_CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_BY_NAME: dict[str, Operation] = {
    "torch.nn.modules.linear.Linear": LinearOperation(),
    "torch.nn.modules.conv.Conv1d": ConvolutionOperation(),
    "torch.nn.modules.conv.Conv2d": ConvolutionOperation(),
    "torch.nn.modules.conv.Conv3d": ConvolutionOperation(),
    "torch.nn.modules.sparse.Embedding": EmbeddingOperation(),
    "transformers.pytorch_utils.Conv1D": TransposedOperation(),
    "bitsandbytes.nn.modules.Linear4bit": QuantisedOperation(),
    "bitsandbytes.nn.modules.Linear8bitLt": QuantisedOperation(),
}
_ANY = Operation()


def operation_of(kind: type) -> Operation:
    """The operation of a module class: of the nearest known class it descends from."""
    if torch.compiler.is_compiling():  # the compiler looks through a cache, and warns of it
        return _operation_of(kind)
    return _cached_operation_of(kind)


def _operation_of(kind: type) -> Operation:
    for entry in kind.__mro__:
        known = _BY_NAME.get(f"{entry.__module__}.{entry.__qualname__}")
        if known is not None and "_graft_base" not in entry.__dict__:
            return known
    return _ANY


_cached_operation_of = functools.cache(_operation_of)


def dequantised(module: Any, stored: Any) -> Tensor:
    """The fp32 (O, I) weight of a bitsandbytes linear."""
    from bitsandbytes import functional as quantised

    if getattr(stored, "quant_state", None) is not None:
        return quantised.dequantize_4bit(stored.data, stored.quant_state).float()
    scale = stored.SCB if getattr(stored, "SCB", None) is not None else module.state.SCB
    codes = stored.CB if getattr(stored, "CB", None) is not None else stored.data
    return codes.float() * (scale.float().unsqueeze(1) / 127)
