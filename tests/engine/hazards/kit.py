"""What the hazard tests share: a small Llama, techniques on its projections, adapters that do something."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graftwork as gw
from graftwork.testing import tiny, tiny_batch

QUERY = "attention.query"
PROJECTIONS = ("attention.query", "attention.value", "feedforward.down")


def llama(**options: object) -> nn.Module:
    return tiny("llama", options)


def batch(name: str = "llama", **options: object) -> dict[str, Tensor]:
    return tiny_batch(name, padding=False, **options)


def jitter(adapter: gw.Adapter, size: float = 0.1, seed: int = 1) -> gw.Adapter:
    """Move every tensor of an adapter off its start, so that being off shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.add_(size * noise.to(parameter.device))
    return adapter


def grafted(
    model: nn.Module, technique: object, name: str = "default", seed: int = 1, **options: object
) -> gw.Adapter:
    """Attach and jitter: the same tensors every time."""
    torch.manual_seed(seed)
    return jitter(gw.attach(model, technique, name=name, **options), seed=seed)


def techniques() -> dict[str, object]:
    """One of each way to run: thin factors, dense weight, rescaling, a bottleneck behind a projection."""
    return {
        "lora": gw.LoRA(rank=4, workspaces=PROJECTIONS),
        "fine-tuning": gw.FineTuning(workspaces=(QUERY,)),
        "ia3": gw.IA3(workspaces=("attention.key", "attention.value")),
        "bottleneck": gw.BottleneckAdapter(width=4, workspaces=("feedforward",)),
    }


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, labels=inputs["input_ids"], use_cache=False).loss


def gradients(adapter: gw.Adapter) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


def largest_gap(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    assert left
    return max(float((left[key] - right[key]).abs().max()) for key in left)
