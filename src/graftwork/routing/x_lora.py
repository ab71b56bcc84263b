"""X-LoRA: a classifier on the base's last hidden states weighs frozen adapters, token by token and layer by layer.

    w = softmax(c(h)),  h (B, T, D) of a first forward without adapters,  w (B, T, L, N)

Buehler and Buehler 2024, arXiv:2402.07148. Two forwards in all; the adapters are any that can be blended.

    B samples, T tokens, L layers, N adapters, D width
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.engine.modules import top_softmax
from graftwork.errors import BadOption, RouteError


class XLoRA(nn.Module):
    """The classifier, as a router: `gw.route(model, names, by=XLoRA(...))`. Train it beside frozen adapters.

    Args:
        width: D of the base's hidden states. layers: L. adapters: N.
        depth: linear layers of the classifier; the inner ones are `size` wide with ReLU and `dropout`.
        top_k: only so many adapters of each token and layer keep a weight; None: all.
        temperature: divides the logits.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        adapters: int,
        *,
        depth: int = 1,
        size: int = 2048,
        dropout: float = 0.2,
        top_k: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if depth < 1 or temperature <= 0:
            raise BadOption(f"X-LoRA: depth={depth} must be at least 1, temperature={temperature:g} above 0")
        if top_k is not None and not 1 <= top_k <= adapters:
            raise BadOption(f"X-LoRA: top_k={top_k} must lie between 1 and the {adapters} adapters")
        inner: list[nn.Module] = []
        for number in range(depth - 1):
            inner += [nn.Linear(size if number else width, size), nn.ReLU(), nn.Dropout(dropout)]
        self.classifier = nn.Sequential(*inner, nn.Linear(size if inner else width, layers * adapters))
        self.shape = layers, adapters
        self.top_k = adapters if top_k is None else top_k
        self.temperature = temperature

    def forward(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        """Weights (B, T, L, N) for a forward with these arguments."""
        if arguments.get("past_key_values") is not None:
            raise RouteError(
                "X-LoRA's first forward would write into the cache; pass use_cache=False (to generate too)"
            )
        plain = {name: value for name, value in arguments.items() if name not in ("labels", "use_cache")}
        with torch.no_grad():
            out = model(**plain | {"output_hidden_states": True, "use_cache": False})
        hidden = out.hidden_states[-1].to(self.classifier[-1].weight.dtype)
        logits = self.classifier(hidden).unflatten(-1, self.shape) / self.temperature
        return top_softmax(logits, self.top_k)
