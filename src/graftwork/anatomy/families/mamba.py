"""State-space models: Mamba and Mamba-2. Their mixers read some weights and call the others."""

from __future__ import annotations

from graftwork.anatomy.anatomy import Anatomy, Place, Places, Stack
from graftwork.reference.site import Access

_PLACES: Places = {
    "ssm.in": "mixer.in_proj",
    "ssm.conv": Place("mixer.conv1d", access=Access.READ),
    "ssm.out": Place("mixer.out_proj", access=Access.EITHER),
}


def _family(family: str, name: str, places: Places) -> Anatomy:
    stack = Stack(
        layers=("layers.*",),
        places={**_PLACES, **places},
        around={"embedding": "embeddings", "norm.final": "norm_f"},
        attention_reason=f"{name} has no attention",
        causal=True,
    )
    return Anatomy(families=(family,), stacks=(stack,))


ANATOMIES = (
    _family(
        "mamba",
        "Mamba",
        {
            "ssm.x": Place("mixer.x_proj", access=Access.EITHER),
            "ssm.dt": Place("mixer.dt_proj", access=Access.READ),
            "norm": "norm",
        },
    ),
    _family("mamba2", "Mamba-2", {"norm": ("norm", "mixer.norm")}),
)
