"""T5, Flan-T5 and mT5: encoder-decoders whose blocks list their sublayers."""

from __future__ import annotations

from graftwork.anatomy.anatomy import Anatomy, Place, Places, Stack
from graftwork.reference.site import Access


def _attention(workspace: str, module: str) -> Places:
    return {
        f"{workspace}.query": f"layer.*.{module}.q",
        f"{workspace}.key": f"layer.*.{module}.k",
        f"{workspace}.value": f"layer.*.{module}.v",
        f"{workspace}.output": f"layer.*.{module}.o",
    }


_PLACES: Places = {
    **_attention("attention", "SelfAttention"),
    "feedforward.gate": "layer.*.DenseReluDense.wi_0",
    "feedforward.up": ("layer.*.DenseReluDense.wi", "layer.*.DenseReluDense.wi_1"),
    "feedforward.down": Place("layer.*.DenseReluDense.wo", access=Access.INSPECTED),
    "norm": "layer.*.layer_norm",
    "embedding.position": "layer.*.SelfAttention.relative_attention_bias",
}


def _stack(name: str, cross: bool) -> Stack:
    return Stack(
        name=name,
        path=name,
        layers=(f"{name}.block.*",),
        places={**_PLACES, **_attention("cross_attention", "EncDecAttention")} if cross else _PLACES,
        around={"embedding": f"{name}.embed_tokens", "norm.final": f"{name}.final_layer_norm"},
        attention="layer.*.SelfAttention",
        cross_attention="layer.*.EncDecAttention" if cross else None,
        causal=cross,
    )


ANATOMIES = (
    Anatomy(
        families=("t5", "mt5"),
        stacks=(_stack("encoder", cross=False), _stack("decoder", cross=True)),
        unused=("shared",),
    ),
)
