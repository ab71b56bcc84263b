"""ModernBERT: a pre-norm encoder with fused projections and a gated feed-forward."""

from __future__ import annotations

from graftwork.anatomy.anatomy import Anatomy, Layout, Part, Place, Stack

ANATOMIES = (
    Anatomy(
        families=("modernbert",),
        stacks=(
            Stack(
                layers=("layers.*",),
                places={
                    "attention.qkv": "attn.Wqkv",
                    "attention.query": Place("attn.Wqkv", Part(0)),
                    "attention.key": Place("attn.Wqkv", Part(1)),
                    "attention.value": Place("attn.Wqkv", Part(2)),
                    "attention.output": "attn.Wo",
                    "feedforward.gate_up": "mlp.Wi",
                    "feedforward.gate": Place("mlp.Wi", Part(0, Layout.EQUAL, 2)),
                    "feedforward.up": Place("mlp.Wi", Part(1, Layout.EQUAL, 2)),
                    "feedforward.down": "mlp.Wo",
                    "norm": ("attn_norm", "mlp_norm"),
                },
                around={
                    "embedding": "embeddings.tok_embeddings",
                    "norm.final": ("embeddings.norm", "final_norm"),
                },
                attention="attn",
                sequence_start=1,
            ),
        ),
    ),
)
