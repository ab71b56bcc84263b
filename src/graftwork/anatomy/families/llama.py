"""Llama and its kin: pre-norm decoders with grouped attention and a gated feed-forward."""

from __future__ import annotations

from graftwork.anatomy.anatomy import Anatomy, Layout, Part, Place, Places, Stack

_ATTENTION: Places = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_MORE_NORMS = (
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
)


def _decoder(
    feedforward: Places, attention: Places = _ATTENTION, norms: tuple[str, ...] = _NORMS
) -> tuple[Stack, ...]:
    return (
        Stack(
            layers=("layers.*",),
            places={**attention, **feedforward, "norm": norms},
            around={"embedding": "embed_tokens", "norm.final": "norm"},
            attention="self_attn",
            causal=True,
        ),
    )


LLAMA = Anatomy(
    families=("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    stacks=_decoder(
        {
            "feedforward.gate": "mlp.gate_proj",
            "feedforward.up": "mlp.up_proj",
            "feedforward.down": "mlp.down_proj",
        },
        norms=_NORMS + _MORE_NORMS,
    ),
)

PHI3 = Anatomy(
    families=("phi3",),
    stacks=_decoder(
        {
            "feedforward.gate_up": "mlp.gate_up_proj",
            "feedforward.gate": Place("mlp.gate_up_proj", Part(0, Layout.EQUAL, 2)),
            "feedforward.up": Place("mlp.gate_up_proj", Part(1, Layout.EQUAL, 2)),
            "feedforward.down": "mlp.down_proj",
        },
        {
            "attention.qkv": "self_attn.qkv_proj",
            "attention.query": Place("self_attn.qkv_proj", Part(0)),
            "attention.key": Place("self_attn.qkv_proj", Part(1)),
            "attention.value": Place("self_attn.qkv_proj", Part(2)),
            "attention.output": "self_attn.o_proj",
        },
    ),
)

MIXTRAL = Anatomy(
    families=("mixtral",),
    stacks=_decoder(
        {
            "feedforward": "mlp",
            "router": Place("mlp.gate", parameter="weight"),
            "experts.gate_up": Place("mlp.experts", parameter="gate_up_proj"),
            "experts.down": Place("mlp.experts", parameter="down_proj"),
        }
    ),
)

ANATOMIES = (LLAMA, PHI3, MIXTRAL)
