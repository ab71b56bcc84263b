"""Tiny-attention adapter: attention with very narrow heads (Zhao et al. 2022, arXiv:2211.01979).

The signal h becomes h + output attention(query n, key n, value n), n = h normalised over its channels to mean
0 and variance 1. `output` starts at zero, so attaching changes no output.

It looks across positions, so it cannot be routed per token; in a stack that only looks back, so does it. It
does not see the padding mask: padded positions are attended like any other, so a row's answer depends on its
padding (in a causal stack, on padding at the left). Decoding with a cache would show it one position at a
time, which is another function and refused: generate with `use_cache=False`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.engine.modules import HiddenModule, Linear
from graftwork.errors import PortUnavailable
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class TinyAttentionAdapter(Technique):
    """Add what a very narrow attention over the positions of a signal answers.

    Args:
        width: of one head.
        heads: number of heads.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.SELF_ATTENTION,
        adaptation=Adaptation.ADDITION,
        input=Input.HIDDEN,
        insertion=Insertion.SEQUENTIAL,
        integration=Integration.DIRECT_ADDITION,
        workspaces=("attention|ssm.out|layer|conv|linear",),
        linear=False,
        identity_at_init=True,
        token_wise=False,
        formula="y = h + O softmax(Q n (K n)^T / sqrt(width)) V n, n = norm(h)",
        parameters="heads width (3 in + out) per site",
        citation="Zhao et al. 2022, Tiny-Attention Adapter: Contexts Are More Important Than the Number of "
        "Parameters, arXiv:2211.01979",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic({"output.weight": Role.SIGNED, "*.weight": Role.INNER})

    width: Annotated[int, AtLeast(1)] = 1
    heads: Annotated[int, AtLeast(1)] = 4

    def build(self, site: Site) -> nn.Module:
        return TinyAttention(self.width_read(site), site.width, self.width, self.heads, site.causal)


class TinyAttention(HiddenModule):
    mixes = True

    def __init__(self, width_in: int, width_out: int, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.query = Linear(width_in, heads * width, bias=False)
        self.key = Linear(width_in, heads * width, bias=False)
        self.value = Linear(width_in, heads * width, bias=False)
        self.output = Linear(heads * width, width_out, bias=False)
        nn.init.zeros_(self.output.weight)
        self.heads, self.causal = heads, causal

    def forward(self, h: Tensor, real: Tensor | None = None) -> Tensor:
        if h.dim() < 3:
            raise PortUnavailable(
                f"tiny-attention-adapter: a signal of shape {tuple(h.shape)} has no positions to attend to. "
                "Choose a workspace whose signal is (batch, positions, channels)"
            )
        tokens = functional.layer_norm(h.flatten(1, -2), h.shape[-1:])
        parts = (part(tokens).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        query, key, value = (part.transpose(1, 2) for part in parts)
        if real is None:
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        else:
            mixed = functional.scaled_dot_product_attention(query, key, value, self._seen(real))
        return self.output(mixed.transpose(1, 2).flatten(2)).unflatten(1, h.shape[1:-1])

    def _seen(self, real: Tensor) -> Tensor:
        """(B, 1, S, S) which positions each looks at; all look at themselves, so that no softmax is empty."""
        size = real.shape[1]
        seen = real[:, None, :] | torch.eye(size, dtype=torch.bool, device=real.device)
        return (seen.tril() if self.causal else seen).unsqueeze(1)
