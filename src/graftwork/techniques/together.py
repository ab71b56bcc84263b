"""Adapters of several techniques that have names of their own: what to hand to `attach`, or to a recipe.

UniPELT (Mao et al. 2022, arXiv:2110.07577) gives LoRA, prefix tuning and a bottleneck adapter a gate each, so that
a row takes as much of each as serves it. The mix-and-match adapter (MAM, He et al. 2022, arXiv:2110.04366) is a
prefix on attention and a scaled parallel adapter beside the feed-forward. Neither is a module of its own: they
are cards, put together.
"""

from __future__ import annotations

from graftwork.reference.properties import Integration
from graftwork.reference.technique import Technique
from graftwork.techniques.bottleneck_adapter import BottleneckAdapter
from graftwork.techniques.lora import LoRA
from graftwork.techniques.prefix_tuning import PrefixTuning

_GATED = Integration.GATED_ADDITION


def unipelt(
    *, rank: int = 8, alpha: float = 2.0, length: int = 10, width: int | None = None
) -> tuple[Technique, ...]:
    """LoRA, prefix tuning and a bottleneck adapter, each behind a gate.

    Args:
        rank, alpha: of LoRA.
        length: of the prefix.
        width: of the adapter; None means a sixteenth of the site's.
    """
    return (
        LoRA(rank=rank, alpha=alpha, integration=_GATED),
        PrefixTuning(length=length, gated=True),
        BottleneckAdapter(width=width, nonlinearity="silu", integration=_GATED),
    )


def mam(
    *, length: int = 30, hidden: int | None = 800, width: int = 512, scale: float = 4.0
) -> tuple[Technique, ...]:
    """Prefix tuning, and a parallel adapter beside the feed-forward.

    Args:
        length, hidden: of the prefix and the MLP that writes it.
        width, scale: of the adapter.
    """
    return PrefixTuning(length=length, hidden=hidden), BottleneckAdapter.parallel(width=width, scale=scale)
