"""Decoders with a fused query-key-value projection or a plain feed-forward, from GPT-2 to Falcon."""

from __future__ import annotations

from graftwork.anatomy.anatomy import Anatomy, Layout, Part, Place, Stack

_ALIBI = "computes its attention itself, with its own position bias; use the sequence port"

GPT2 = Anatomy(
    families=("gpt2",),
    stacks=(
        Stack(
            layers=("h.*",),
            places={
                "attention.qkv": "attn.c_attn",
                "attention.query": Place("attn.c_attn", Part(0)),
                "attention.key": Place("attn.c_attn", Part(1)),
                "attention.value": Place("attn.c_attn", Part(2)),
                "attention.output": "attn.c_proj",
                "cross_attention.query": "crossattention.q_attn",
                "cross_attention.key_value": "crossattention.c_attn",
                "cross_attention.key": Place("crossattention.c_attn", Part(0, Layout.EQUAL, 2)),
                "cross_attention.value": Place("crossattention.c_attn", Part(1, Layout.EQUAL, 2)),
                "cross_attention.output": "crossattention.c_proj",
                "feedforward.up": "mlp.c_fc",
                "feedforward.down": "mlp.c_proj",
                "norm": ("ln_1", "ln_2", "ln_cross_attn"),
            },
            around={"embedding": "wte", "embedding.position": "wpe", "norm.final": "ln_f"},
            attention="attn",
            cross_attention="crossattention",
            causal=True,
        ),
    ),
)

GPT_NEOX = Anatomy(
    families=("gpt_neox",),
    stacks=(
        Stack(
            layers=("layers.*",),
            places={
                "attention.qkv": "attention.query_key_value",
                "attention.query": Place("attention.query_key_value", Part(0, Layout.HEADS)),
                "attention.key": Place("attention.query_key_value", Part(1, Layout.HEADS)),
                "attention.value": Place("attention.query_key_value", Part(2, Layout.HEADS)),
                "attention.output": "attention.dense",
                "feedforward.up": "mlp.dense_h_to_4h",
                "feedforward.down": "mlp.dense_4h_to_h",
                "norm": ("input_layernorm", "post_attention_layernorm"),
            },
            around={"embedding": "embed_in", "norm.final": "final_layer_norm"},
            attention="attention",
            causal=True,
        ),
    ),
)

OPT = Anatomy(
    families=("opt",),
    stacks=(
        Stack(
            path="decoder",
            layers=("decoder.layers.*",),
            places={
                "attention.query": "self_attn.q_proj",
                "attention.key": "self_attn.k_proj",
                "attention.value": "self_attn.v_proj",
                "attention.output": "self_attn.out_proj",
                "feedforward.up": "fc1",
                "feedforward.down": "fc2",
                "norm": ("self_attn_layer_norm", "final_layer_norm"),
            },
            around={
                "embedding": "decoder.embed_tokens",
                "embedding.position": "decoder.embed_positions",
                "embedding.projection": ("decoder.project_in", "decoder.project_out"),
                "norm.final": "decoder.final_layer_norm",
            },
            attention="self_attn",
            causal=True,
        ),
    ),
)

BLOOM = Anatomy(
    families=("bloom",),
    stacks=(
        Stack(
            layers=("h.*",),
            places={
                "attention.qkv": "self_attention.query_key_value",
                "attention.query": Place("self_attention.query_key_value", Part(0, Layout.HEADS)),
                "attention.key": Place("self_attention.query_key_value", Part(1, Layout.HEADS)),
                "attention.value": Place("self_attention.query_key_value", Part(2, Layout.HEADS)),
                "attention.output": "self_attention.dense",
                "feedforward.up": "mlp.dense_h_to_4h",
                "feedforward.down": "mlp.dense_4h_to_h",
                "norm": ("input_layernorm", "post_attention_layernorm"),
            },
            around={"embedding": "word_embeddings", "norm.final": ("word_embeddings_layernorm", "ln_f")},
            attention="self_attention",
            attention_reason=f"BLOOM {_ALIBI}",
            causal=True,
        ),
    ),
)

# Falcon has three layouts of its fused projection, chosen by configuration, so only the whole is a workspace.
FALCON = Anatomy(
    families=("falcon",),
    stacks=(
        Stack(
            layers=("h.*",),
            places={
                "attention.qkv": "self_attention.query_key_value",
                "attention.output": "self_attention.dense",
                "feedforward.up": "mlp.dense_h_to_4h",
                "feedforward.down": "mlp.dense_4h_to_h",
                "norm": ("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp"),
            },
            around={"embedding": "word_embeddings", "norm.final": "ln_f"},
            attention="self_attention",
            attention_reason=f"Falcon {_ALIBI}",
            causal=True,
        ),
    ),
)

ANATOMIES = (GPT2, GPT_NEOX, OPT, BLOOM, FALCON)
