"""What a technique's module must look like, port by port.

All modules compute in the precision of the signal they are given: adapter tensors are fp32 beside a low-precision
base, so a module casts its own (small) tensors to the signal, never the signal to its tensors.

    B samples, T tokens, C channels, R rank, N added positions; (..., O, I) a weight as output x input matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.engine.hints import Hints as Hints

if TYPE_CHECKING:
    from graftwork.engine.below import Below


class WeightModule(nn.Module):
    """Weight port: an effective weight W' = f(W, theta), and perhaps an effective bias.

    `effective` must be differentiable and pure; the engine calls it with an fp32 or compute-precision matrix and
    uses the result in the host's own operation. Merging calls it in fp32.

    A module that knows a cheaper way than through a dense weight says so by `answer`; linear layers then ask it.
    """

    def effective(self, weight: Tensor, base: Tensor) -> Tensor:
        """The new matrix (..., O, I). `weight` is what earlier modules of the stack made of `base`."""
        return weight

    def effective_bias(self, bias: Tensor, base: Tensor) -> Tensor:
        """The new bias (O,). `bias` is what earlier modules of the stack made of `base`."""
        return bias

    def answer(self, x: Tensor, below: Below) -> Tensor:
        """What a linear layer answers to x (..., I), bias included: the same as with `effective(below.matrix())`.

        `below(x)` is the answer without this module.
        """
        raise NotImplementedError


class DeltaModule(WeightModule):
    """A weight module that adds a matrix: W' = W + delta."""

    def delta(self) -> Tensor:
        """The change (..., O, I)."""
        raise NotImplementedError

    def effective(self, weight: Tensor, base: Tensor) -> Tensor:
        return weight + self.delta().to(weight.dtype)

    def added(self, x: Tensor) -> Tensor:
        """x deltaᵀ, (..., O) for x (..., I), without forming the delta; override where that is cheaper."""
        raise NotImplementedError


class LowRankModule(DeltaModule):
    """A delta with thin factors: scale * up @ down. The engine runs, routes and concatenates the factors.

    Attributes (set by the subclass):
        down: (..., R, I); up: (..., O, R); scale: a float; dropout: probability on the adapter's input.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    dropout: float = 0.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """(down, up) with up unscaled; override where they are derived from other tensors."""
        return self.down, self.up

    def taken(self) -> tuple[Tensor, Tensor] | None:
        """A frozen pair (down, up) whose product is subtracted: what an initialiser took out of the weight."""
        return None

    def delta(self) -> Tensor:
        down, up = self.factors()
        delta, taken = self.scale * (up @ down), self.taken()
        return delta if taken is None else delta - taken[1] @ taken[0]


@dataclass(frozen=True)
class Span:
    """Which positions of a row a hidden module changes: the `first` and the `last` so many real ones of those
    routed to it, or all where both are None; never one that is decoded with a cache."""

    first: int | None = None
    last: int | None = None


class HiddenModule(nn.Module):
    """Hidden port: reads a signal (..., C) and answers z, which the card's integration joins to the host's y.

    Direct and scaled addition: z (..., C). Rescaling: z broadcastable to (..., C), or (z, shift).
    Gated addition: (gate in [0, 1], z), joined as (1 - gate) y + gate (y + z). Channels are always last; the
    engine moves them for convolutions.

    Attributes:
        span: the positions it is for, where it acts on tokens one by one; None: all of every call.
        mixes: it looks at other positions of a row, and is called with a second argument that says which exist
            for that row: (B, S), or None for all. (Rows whose prompts differ in length are filled up.)
        takes: how many of its experts a token takes, where it has a router over several (0: none).
    """

    span: Span | None = None
    mixes: bool = False
    takes: int = 0

    def scores(self, x: Tensor) -> Tensor:
        """(..., E) the logits of its router over E experts."""
        raise NotImplementedError


class PrefixModule(nn.Module):
    """Attention port: `forward()` gives keys (N, key_width) and values (N, value_width).

    With a module `gate` (a `Gate` of the attention's input) each row's values are multiplied by its gate.

    Attributes:
        shift_positions: how far the host's own positions are moved: N for a prefix that was trained in a
            cache, as HF PEFT does it, where tokens count on from its length; 0 for one without positions.
    """

    shift_positions: int = 0


class Positions(NamedTuple):
    """Positions (N, C), or (B, N, C) for rows that have their own; a row has the first `counts` (B,) of them."""

    values: Tensor
    counts: Tensor | None = None


class PromptModule(nn.Module):
    """Sequence port: `forward()` gives positions (N, C) put in at the stack's input, or (B, N, C) for rows that
    have their own.

    A deep prompt is built once per layer; module i overwrites the reserved slots at layer i.

    Attributes:
        front: before leading positions too that otherwise stay in front of a prompt (CLS).
        stays: the positions are left in the stack's output, for a head that reads them.
        hinted: what it gives depends on the query and the passage of each row; `positions` is told them.
    """

    front: bool = False
    stays: bool = False
    hinted: bool = False

    def positions(self, hints: Hints | None) -> Positions:
        """What is put in; hints are given where the module is `hinted`, and fit the batch."""
        return Positions(self())


class Linear(nn.Linear):
    """A linear layer that computes in the precision of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype), bias)


class Gate(nn.Module):
    """(B,) sigmoid(w x) in [0, 1] for each row of a signal x (B, ..., C), averaged over its positions, or over
    those that are `real` (B, S)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width).normal_(std=0.02))

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        open_ = (x @ self.weight.to(x.dtype)).sigmoid()
        if real is not None:
            return (open_ * real).sum(1) / real.sum(1).to(open_.dtype)
        return open_ if open_.dim() == 1 else open_.flatten(1).mean(1)


class LayerNorm(nn.LayerNorm):
    """A layer norm that computes in the precision of its input."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class CrossAttention(nn.Module):
    """Multi-head attention with the parameters, and their start, of `nn.MultiheadAttention`, in the precision of its
    input: queries (B, M, C) look at a signal (B, N, C) where a mask (B, N) is true."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.projection = Linear(width, 3 * width)
        nn.init.xavier_uniform_(self.projection.weight)
        self.output = Linear(width, width)
        for layer in (self.projection, self.output):
            nn.init.zeros_(layer.bias)
        self.heads, self.dropout = heads, dropout

    def forward(self, queries: Tensor, signal: Tensor, seen: Tensor) -> Tensor:
        weights, biases = (
            [each.to(signal.dtype) for each in tensor.chunk(3)]
            for tensor in (self.projection.weight, self.projection.bias)
        )
        query, key, value = (
            functional.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((queries, signal, signal), weights, biases, strict=True)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, seen[:, None, None], dropout)
        return self.output(mixed.transpose(1, 2).flatten(2))


class HintModule(PromptModule):
    """A prompt module that reads hints: rows of a table of its own (V, C) or of the host's, words around, an MLP with
    `depth` inner layers and ReLU (0: none), and which passage tokens it looks at."""

    hinted = True
    opening: Tensor
    closing: Tensor

    def __init__(
        self,
        width: int,
        depth: int,
        table: Tensor | None,
        words: tuple[tuple[int, ...], tuple[int, ...]],
        distinct: bool,
        unasked: bool,
        count: int = 0,
    ) -> None:
        super().__init__()
        self.table = None if table is None else nn.Parameter(table.clone())
        for name, ids in zip(("opening", "closing"), words, strict=True):
            self.register_buffer(name, torch.tensor(ids, dtype=torch.long), persistent=False)
        layers = [Linear(width, width) for _ in range(depth + 1 if depth else 0)]
        self.mlp = nn.Sequential(*[each for layer in layers for each in (layer, nn.ReLU())][:-1])
        self.distinct, self.unasked, self.count = distinct, unasked, count

    def rows(self, ids: Tensor, hints: Hints) -> Tensor:
        """What the table holds for token numbers, in the host's precision."""
        if self.table is None:
            return hints.embed(ids)
        return functional.embedding(ids, self.table).to(hints.dtype)

    def seen(self, hints: Hints) -> Tensor:
        """(B, N) the passage tokens to look at."""
        return hints.seen(self.distinct, self.unasked)

    def positions(self, hints: Hints | None) -> Positions:
        return self(hints)


def top_softmax(logits: Tensor, count: int) -> Tensor:
    """Softmax over the `count` largest logits (..., N) of each row, 0 for the others."""
    if count < logits.shape[-1]:
        least = logits.topk(count, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits.softmax(-1)


def activation(name: str) -> nn.Module:
    """The activation of that name ("relu", "gelu", "silu", "tanh")."""
    return {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU(), "tanh": nn.Tanh()}[name]


def planned() -> bool:
    """Whether modules are only being counted: what is made now has a shape and no values, and none may be read."""
    made = torch.empty(0)
    return made.is_meta or type(made) is not Tensor  # a FakeTensor


def zeros(*shape: int) -> nn.Parameter:
    """A trainable tensor of zeros."""
    return nn.Parameter(torch.zeros(*shape))


def uniform(*shape: int) -> nn.Parameter:
    """A trainable matrix (..., R, C) drawn from +-1/sqrt(C): Kaiming-uniform with a = sqrt 5."""
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))
