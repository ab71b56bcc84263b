"""Ways to tune a host, each as we do it and as the peer does, built on one shared frozen base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.bench import peer
from graftwork.bench.hosts import Host, share
from graftwork.engine.recompute import enable_checkpointing
from graftwork.reference.technique import Technique

FLOOR, FULL = "frozen floor", "full fine-tuning"
LINEARS = ("attention.*", "feedforward.*")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of tuning.

    Attributes:
        name: in tables.
        technique: ours.
        peer: the peer's configuration for a host, None where it has no such technique.
        checkpointing: recompute activations layer by layer.
        lean: the lean host; it is held against the peer's plain form of the technique.
    """

    name: str
    technique: Callable[[], Technique]
    peer: Callable[[Host], Any] | None = None
    checkpointing: bool = False
    lean: bool = False


@dataclass(frozen=True)
class Subject:
    """A model ready to be trained: `side` is "ours", "peer", or the variant's own name for floor and full."""

    variant: str
    side: str
    model: Any

    @property
    def trained(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]


def variants() -> tuple[Variant, ...]:
    """All of them, in the order of the tables."""
    from graftwork.techniques.bottleneck_adapter import BottleneckAdapter
    from graftwork.techniques.ia3 import IA3
    from graftwork.techniques.lora import LoRA
    from graftwork.techniques.norm_tuning import NormTuning
    from graftwork.techniques.prefix_tuning import PrefixTuning
    from graftwork.techniques.prompt_tuning import PromptTuning

    def lora(dropout: float = 0.0, workspaces: tuple[str, ...] = LINEARS) -> Callable[[], Technique]:
        return lambda: LoRA(rank=16, alpha=32, dropout=dropout, workspaces=workspaces)

    query_value = lora(workspaces=("attention.query", "attention.value"))
    return (
        Variant(name="LoRA r16, all linears", technique=lora(), peer=peer.lora),
        Variant(
            name="LoRA r16, query and value",
            technique=query_value,
            peer=lambda host: peer.lora(host, modules="query-value"),
        ),
        Variant(
            name="LoRA r16, dropout 0.05",
            technique=lora(dropout=0.05),
            peer=lambda host: peer.lora(host, lora_dropout=0.05),
        ),
        Variant(name="LoRA r16, checkpointing", technique=lora(), peer=peer.lora, checkpointing=True),
        Variant(name="LoRA r16, lean host", technique=lora(), peer=peer.lora, lean=True),
        Variant(name="(IA)3", technique=IA3, peer=peer.ia3),
        Variant(
            name="prefix tuning, 20", technique=lambda: PrefixTuning(length=20, hidden=None), peer=peer.prefix
        ),
        Variant(name="prompt tuning, 20", technique=lambda: PromptTuning(length=20), peer=peer.prompt),
        Variant(name="norm tuning", technique=NormTuning, peer=peer.norms),
        Variant(name="bottleneck adapter", technique=BottleneckAdapter),
    )


def base_of(host: Host, dtype: torch.dtype, device: str) -> nn.Module:
    """The frozen host that all variants share."""
    return host.make().to(device=device, dtype=dtype).requires_grad_(False).train()


def subjects(
    host: Host, dtype: torch.dtype, device: str, chosen: tuple[Variant, ...]
) -> Iterator[Subject | Failure]:
    """The floor, full fine-tuning, then each variant, ours before the peer's."""
    base = base_of(host, dtype, device)
    yield Subject(FLOOR, FLOOR, floor(share(base)))
    yield Subject(FULL, FULL, host.make().to(device=device, dtype=dtype).train())
    for variant in chosen:
        if variant.lean and host.task != "causal":
            continue  # nothing there that it could take over
        yield _built(variant, "ours", partial(ours, share(base), variant))
        if variant.peer is not None and peer.available():
            yield _built(variant, "peer", partial(theirs, share(base), variant, host))


@dataclass(frozen=True)
class Failure:
    """A variant that could not be built, or could not make a step, and why."""

    variant: str
    side: str
    reason: str


def _built(variant: Variant, side: str, make: Callable[[], Any]) -> Subject | Failure:
    try:
        return Subject(variant.name, side, make())
    except Exception as error:  # one library's refusal of one variant is a result, not the end of the run
        return failure(variant.name, side, error)


def failure(variant: str, side: str, error: Exception) -> Failure:
    """An exception as a result."""
    return Failure(variant, side, f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")


def ours(model: Any, variant: Variant) -> Any:
    """graftwork attached to the model."""
    from graftwork.engine.attach import attach

    attach(model, variant.technique())
    if variant.checkpointing:
        enable_checkpointing(model)
    if variant.lean:
        from graftwork.engine.lean_host import lean

        lean(model)
    return model.train()


def theirs(model: Any, variant: Variant, host: Host) -> Any:
    """The peer wrapped around the model."""
    assert variant.peer is not None
    wrapped = peer.wrap(model, variant.peer(host))
    if variant.checkpointing:
        enable_checkpointing(model)
    return wrapped.train()


def floor(model: Any) -> Any:
    """Nothing attached; gradients flow to what the first layer reads."""

    def track(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out.requires_grad_()

    model.get_input_embeddings().register_forward_hook(track)
    return model
