"""BERT and its kin: post-norm encoders with separate query, key and value."""

from __future__ import annotations

from graftwork.anatomy.anatomy import Anatomy, Place, Places, Stack
from graftwork.reference.site import Access

_NO_INTERFACE = "DeBERTa computes its disentangled attention itself; use the sequence port"


def _layer(query: str, key: str, value: str) -> Places:
    return {
        "attention.query": f"attention.self.{query}",
        "attention.key": f"attention.self.{key}",
        "attention.value": f"attention.self.{value}",
        "attention.output": "attention.output.dense",
        "feedforward.up": "intermediate.dense",
        "feedforward.down": "output.dense",
        "norm": ("attention.output.LayerNorm", "output.LayerNorm"),
    }


_CROSS: Places = {
    "cross_attention.query": "crossattention.self.query",
    "cross_attention.key": "crossattention.self.key",
    "cross_attention.value": "crossattention.self.value",
    "cross_attention.output": "crossattention.output.dense",
    "norm": ("attention.output.LayerNorm", "crossattention.output.LayerNorm", "output.LayerNorm"),
}
_AROUND: Places = {
    "embedding": "embeddings.word_embeddings",
    "embedding.position": "embeddings.position_embeddings",
    "embedding.type": "embeddings.token_type_embeddings",
    "norm.final": "embeddings.LayerNorm",
}

BERT = Anatomy(
    families=("bert", "roberta", "xlm-roberta", "electra"),
    stacks=(
        Stack(
            layers=("encoder.layer.*",),
            places={**_layer("query", "key", "value"), **_CROSS},
            around={**_AROUND, "embedding.projection": "embeddings_project", "pooler": "pooler.dense"},
            attention="attention.self",
            cross_attention="crossattention.self",
            sequence_start=1,
        ),
    ),
)

DEBERTA = Anatomy(
    families=("deberta-v2",),
    stacks=(
        Stack(
            layers=("encoder.layer.*",),
            places=_layer("query_proj", "key_proj", "value_proj"),
            around={
                **_AROUND,
                "embedding.position": (
                    "embeddings.position_embeddings",
                    Place("encoder.rel_embeddings", access=Access.READ),
                ),
                "embedding.projection": "embeddings.embed_proj",
                "conv": "encoder.conv.conv",
                "norm.final": ("embeddings.LayerNorm", "encoder.conv.LayerNorm", "encoder.LayerNorm"),
            },
            attention="attention.self",
            attention_reason=_NO_INTERFACE,
            sequence_start=1,
        ),
    ),
)

DISTILBERT = Anatomy(
    families=("distilbert",),
    stacks=(
        Stack(
            layers=("transformer.layer.*",),
            places={
                "attention.query": "attention.q_lin",
                "attention.key": "attention.k_lin",
                "attention.value": "attention.v_lin",
                "attention.output": "attention.out_lin",
                "feedforward.up": "ffn.lin1",
                "feedforward.down": "ffn.lin2",
                "norm": ("sa_layer_norm", "output_layer_norm"),
            },
            around={
                "embedding": "embeddings.word_embeddings",
                "embedding.position": "embeddings.position_embeddings",
                "norm.final": "embeddings.LayerNorm",
            },
            attention="attention",
            sequence_start=1,
        ),
    ),
)

ANATOMIES = (BERT, DEBERTA, DISTILBERT)
