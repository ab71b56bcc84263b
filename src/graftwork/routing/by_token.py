"""Routing by what a token is: image or text, one language or another, told by its number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.errors import BadOption, RouteError


class ByToken:
    """The index (B, T) of a forward from its `input_ids`; cached decoding routes the new tokens alike.

    Args:
        groups: token number -> place of its adapter among the route's names (-1: the bare base).
        other: place of every token that is not listed.
        argument: which argument holds the token numbers.
        dropout: while the model trains, the share of tokens whose adapter is off in this forward, in all layers; what
            the others' adapters change grows by 1 / (1 - dropout) (Context-PEFT's mask dropout).
    """

    def __init__(
        self,
        groups: Mapping[int, int],
        *,
        other: int = -1,
        argument: str = "input_ids",
        dropout: float = 0.0,
    ) -> None:
        if not 0 <= dropout < 1:
            raise BadOption(f"routing by token: dropout={dropout:g} must lie in [0, 1)")
        self.groups = dict(groups)
        self.other = other
        self.argument = argument
        self.dropout = dropout

    def __call__(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        ids = arguments.get(self.argument)
        if not isinstance(ids, Tensor):
            raise RouteError(
                f"routing by token reads {self.argument!r}, and the model was called with {sorted(arguments)}; "
                "pass it, or route by an index"
            )
        index = torch.full_like(ids, self.other)
        for token, place in self.groups.items():
            index = torch.where(ids == token, place, index)
        return self._dropped(index) if self.dropout and model.training else index

    def _dropped(self, index: Tensor) -> Tensor:
        """The index (B, T) as weights (B, T, N) with tokens left out."""
        count = 1 + max([self.other, *self.groups.values()])
        kept = (torch.rand(index.shape, device=index.device) >= self.dropout) / (1 - self.dropout)
        return (index[..., None] == torch.arange(count, device=index.device)) * kept[..., None]
