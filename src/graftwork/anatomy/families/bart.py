"""BART and Whisper: encoder-decoders with separate projections and two-layer feed-forwards."""

from __future__ import annotations

from graftwork.anatomy.anatomy import Anatomy, Places, Stack

_PLACES: Places = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.out_proj",
    "feedforward.up": "fc1",
    "feedforward.down": "fc2",
    "norm": ("self_attn_layer_norm", "final_layer_norm"),
}
_CROSS: Places = {
    "cross_attention.query": "encoder_attn.q_proj",
    "cross_attention.key": "encoder_attn.k_proj",
    "cross_attention.value": "encoder_attn.v_proj",
    "cross_attention.output": "encoder_attn.out_proj",
    "norm": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}


def _stack(name: str, around: Places, sequence: str = "stack") -> Stack:
    decoder = name == "decoder"
    return Stack(
        name=name,
        path=name,
        layers=(f"{name}.layers.*",),
        places={**_PLACES, **_CROSS} if decoder else _PLACES,
        around=around,
        attention="self_attn",
        cross_attention="encoder_attn" if decoder else None,
        sequence=sequence,
        causal=decoder,
    )


def _text(name: str, final: str) -> Places:
    return {
        "embedding": f"{name}.embed_tokens",
        "embedding.position": f"{name}.embed_positions",
        "norm.final": f"{name}.{final}",
    }


BART = Anatomy(
    families=("bart",),
    stacks=tuple(_stack(name, _text(name, "layernorm_embedding")) for name in ("encoder", "decoder")),
    unused=("shared",),
)

WHISPER = Anatomy(
    families=("whisper",),
    stacks=(
        _stack(
            "encoder",
            {
                "embedding": ("encoder.conv1", "encoder.conv2"),
                "embedding.position": "encoder.embed_positions",
                "norm.final": "encoder.layer_norm",
            },
            sequence="layers",
        ),
        _stack("decoder", _text("decoder", "layer_norm")),
    ),
)

ANATOMIES = (BART, WHISPER)
