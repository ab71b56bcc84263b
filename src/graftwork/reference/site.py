"""A site: one workspace resolved to one place in one model, with the shapes that a technique needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from graftwork.reference.statistic import Statistic


class Kind(StrEnum):
    """What the host module at a site is, as far as techniques care."""

    LINEAR = "linear"
    CONVOLUTION = "convolution"
    EMBEDDING = "embedding"
    NORM = "norm"
    PARAMETER = "parameter"  # a bare matrix such as fused expert weights: read, never called
    TENSOR = "tensor"  # any other bare parameter: a class token, positions, constants of a state space
    BLOCK = "block"  # a module without a weight of its own (layer)
    ATTENTION = "attention"  # an attention module: extra keys and values
    STACK = "stack"  # a stack of layers: extra positions


class Access(StrEnum):
    """How a host uses a module's parameters."""

    CALLED = "called"  # the module is called
    READ = "read"  # its parameters are read, it is never called
    EITHER = "either"  # called on one path of the host, read on another (fused kernels)
    INSPECTED = "inspected"  # called; besides, only the type or device of the weight is looked at


class Side(StrEnum):
    """Which end of the module the workspace means."""

    OUTPUT = "output"
    INPUT = "input"


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place. Widths are channel counts; matrices are (..., out, in) whatever the storage layout.

    Attributes:
        key: unique name in this model, `3/attention.query`, `decoder.0/cross_attention.key`, `embedding`.
        workspace: the workspace without stack (`attention.query`).
        stack: `encoder`, `decoder`, `vision`, `text`, or empty when the model has one stack.
        layer: number of the layer in its stack, None outside layers.
        module: dotted name of the host module whose class is swapped.
        parameter: the host parameter a weight-port module changes (`weight`; `gate_up_proj` of experts).
        side: OUTPUT, or INPUT when the workspace is what the module reads (`feedforward.activation`).
        entry: dotted name of the module whose input a parallel module reads, when it is not `module` itself
            (the feed-forward block reads what its first projection reads).
        channels: (start, stop) rows of the output that this workspace owns in a fused projection; for
            interleaved layouts (heads, parts, part, head_dim). None: all.
        fused_width: width of the whole fused projection when `channels` is set, else 0.
        channel_axis: axis of the channels in the activations (1 for convolutions and batch norms, else -1).
        access: whether the host calls the module or reads its parameters (`nn.MultiheadAttention.out_proj`).
        width_in, width_out: channels of the matrix (for a convolution `width_in` is
            in_channels / groups x kernel).
        channels_in, channels_out: channels of the activations read and changed at this site.
        kernel: kernel shape of a convolution, () otherwise.
        batch: leading dimensions of the matrix (experts); the whole shape of a TENSOR; () otherwise.
        has_bias: whether the host module has a bias.
        causal: the stack looks back only, so a module that looks across positions must not look ahead.
        key_width, value_width: width of keys and values (all heads), for the attention port.
        heads: number of key/value heads, for the attention port.
        patch: values that one embedded position is made of (channels x patch area), for the sequence port;
            0 where positions are rows of a table.
        dtype, device: of the host parameter (adapter tensors are made on the same device).
        matrix: returns the host weight in fp32, dequantised, shaped as `shape` says; for initialisers that
            read it. At a STACK the embedding table as (channels, vocabulary), None where the stack has none.
            Raises on the meta device.
        bias: returns the host bias in fp32, (width_out,); None where `has_bias` is false.
        original: returns the weight as it was before quantisation, shaped as `shape` says, where it was given.
        statistic: what calibration data gave for this site, where the technique asked for something.
    """

    key: str
    workspace: str
    kind: Kind
    module: str
    stack: str = ""
    layer: int | None = None
    layers: int = 0
    parameter: str = "weight"
    side: Side = Side.OUTPUT
    entry: str | None = None
    channels: tuple[int, ...] | None = None
    fused_width: int = 0
    channel_axis: int = -1
    access: Access = Access.CALLED
    width_in: int = 0
    width_out: int = 0
    channels_in: int = 0
    channels_out: int = 0
    kernel: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    has_bias: bool = False
    causal: bool = False
    key_width: int = 0
    value_width: int = 0
    heads: int = 0
    patch: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    matrix: Callable[[], Tensor] | None = field(default=None, compare=False, repr=False)
    bias: Callable[[], Tensor] | None = field(default=None, compare=False, repr=False)
    original: Callable[[], Tensor] | None = field(default=None, compare=False, repr=False)
    statistic: Statistic | None = field(default=None, compare=False, repr=False)

    @property
    def read_only(self) -> bool:
        """Whether the host never calls the module."""
        return self.access is Access.READ

    @property
    def width(self) -> int:
        """Channels of the signal that a hidden-port module changes here."""
        return self.channels_in if self.side is Side.INPUT else self.channels_out

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the host weight as the weight port gives it: (width,) for a norm, that of a bare tensor as it
        is, else (..., out, in)."""
        if self.kind is Kind.TENSOR:
            return self.batch
        return (self.width_out,) if self.kind is Kind.NORM else (*self.batch, self.width_out, self.width_in)

    @property
    def weighted(self) -> bool:
        """Whether the site stands for a parameter of its own; a block or inner activation borrows one."""
        return self.kind in _WEIGHTED and self.side is Side.OUTPUT and self.entry is None

    @property
    def has_matrix(self) -> bool:
        """Whether that parameter has rows and columns: it multiplies a signal, or is a table."""
        return self.weighted and self.kind in (*_MATRICES, Kind.EMBEDDING)

    @property
    def multiplies(self) -> bool:
        """Whether that parameter is a matrix which a signal is multiplied by: no table, no gains of a norm."""
        return self.weighted and self.kind in _MATRICES


_MATRICES = (Kind.LINEAR, Kind.CONVOLUTION, Kind.PARAMETER)
_WEIGHTED = (*_MATRICES, Kind.EMBEDDING, Kind.NORM, Kind.TENSOR)
