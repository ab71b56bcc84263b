"""BA-LoRA: LoRA on top singular directions and three terms on the outputs (Chang et al. 2024, arXiv:2408.04556).

The adapter is PiSSA's: B A starts as the top `rank` singular triplets of the weight, which are subtracted beside it, so
the first output is the base's. What is new is the loss: consistency with the base, diversity of the outputs and
concentration of their spectrum. They are objectives, which any technique can be trained with; their weights in the
paper are 0.15, 0.03 and 0.03 for understanding, 0.025, 0.005 and 0.005 for generation. The teacher is the same model
with the adapter switched off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.techniques.lora import Init, LoRA


@register
@dataclass(frozen=True, kw_only=True)
class BALoRA(LoRA, name="ba-lora"):
    """LoRA from the top singular directions; train it with the objectives that belong to it. Options as LoRA's."""

    published: ClassVar[Card] = replace(
        LoRA.published,
        formula="y = (W - s B0 A0) x + s B A x, with B0 A0 = B A at the start",
        citation="Chang et al. 2024, BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic "
        "Inheritance in Large Language Models, arXiv:2408.04556",
    )

    init: Init = "pissa"
