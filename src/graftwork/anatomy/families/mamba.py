"""State-space models: Mamba and Mamba-2. Their step-size projection is read by the mixer and never called."""

from __future__ import annotations

from graftwork.anatomy.anatomy import Anatomy, Place, Stack
from graftwork.reference.site import Access

ANATOMIES = tuple(
    Anatomy(
        families=(family,),
        stacks=(
            Stack(
                layers=("layers.*",),
                places={
                    "ssm.in": "mixer.in_proj",
                    "ssm.conv": Place("mixer.conv1d", access=Access.READ),
                    "ssm.x": Place("mixer.x_proj", access=Access.EITHER),
                    "ssm.dt": Place("mixer.dt_proj", access=Access.READ),
                    "ssm.out": Place("mixer.out_proj", access=Access.EITHER),
                    "norm": ("norm", "mixer.norm"),
                },
                around={"embedding": "embeddings", "norm.final": "norm_f"},
                attention_reason=f"{name} has no attention",
                causal=True,
            ),
        ),
    )
    for family, name in (("mamba", "Mamba"), ("mamba2", "Mamba-2"))
)
