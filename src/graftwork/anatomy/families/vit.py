"""Vision transformers (ViT, DINOv2, Swin) and the two towers of CLIP."""

from __future__ import annotations

from graftwork.anatomy.anatomy import Anatomy, Places, Stack

_WINDOWS = "Swin cuts its positions into windows, so added ones have no place; use prefix tuning"


def _layer(norms: tuple[str, ...], output: str = "o_proj", attention: str = "attention") -> Places:
    return {
        "attention.query": f"{attention}.q_proj",
        "attention.key": f"{attention}.k_proj",
        "attention.value": f"{attention}.v_proj",
        "attention.output": f"{attention}.{output}",
        "feedforward.up": "mlp.fc1",
        "feedforward.down": "mlp.fc2",
        "norm": norms,
    }


VIT = Anatomy(
    families=("vit",),
    stacks=(
        Stack(
            layers=("layers.*",),
            places=_layer(("layernorm_before", "layernorm_after")),
            around={
                "embedding": "embeddings.patch_embeddings.projection",
                "norm.final": "layernorm",
                "pooler": "pooler.dense",
            },
            attention="attention",
            sequence="layers",
            sequence_start=1,
        ),
    ),
)

DINOV2 = Anatomy(
    families=("dinov2",),
    stacks=(
        Stack(
            layers=("encoder.layer.*",),
            places={
                **_layer(("norm1", "norm2")),
                "feedforward.gate": "mlp.gate_proj",
                "feedforward.up": ("mlp.fc1", "mlp.up_proj"),
                "feedforward.down": ("mlp.fc2", "mlp.down_proj"),
            },
            around={"embedding": "embeddings.patch_embeddings.projection", "norm.final": "layernorm"},
            attention="attention",
            sequence="layers",
            sequence_start=1,
        ),
    ),
    unused=("embeddings.mask_token",),  # read when patches are masked, in pretraining
)

SWIN = Anatomy(
    families=("swin",),
    stacks=(
        Stack(
            layers=("encoder.layers.*.blocks.*",),
            places=_layer(("layernorm_before", "layernorm_after")),
            around={
                "embedding": "embeddings.patch_embeddings.projection",
                "downsample": "encoder.layers.*.downsample.reduction",
                "norm.final": ("embeddings.norm", "encoder.layers.*.downsample.norm", "layernorm"),
            },
            attention="attention",
            sequence=None,
            sequence_reason=_WINDOWS,
        ),
    ),
)

CLIP_VISION = Anatomy(
    families=("clip_vision_model",),
    stacks=(
        Stack(
            layers=("encoder.layers.*",),
            places=_layer(("layer_norm1", "layer_norm2"), "out_proj", "self_attn"),
            around={
                "embedding": "embeddings.patch_embedding",
                "embedding.position": "embeddings.position_embedding",
                "norm.final": ("pre_layrnorm", "post_layernorm"),
            },
            attention="self_attn",
            sequence="layers",
            sequence_start=1,
        ),
    ),
)

CLIP_TEXT = Anatomy(
    families=("clip_text_model",),
    stacks=(
        Stack(
            layers=("encoder.layers.*",),
            places=_layer(("layer_norm1", "layer_norm2"), "out_proj", "self_attn"),
            around={
                "embedding": "embeddings.token_embedding",
                "embedding.position": "embeddings.position_embedding",
                "norm.final": "final_layer_norm",
            },
            attention="self_attn",
            sequence="layers",
            causal=True,
        ),
    ),
)

ANATOMIES = (VIT, DINOV2, SWIN, CLIP_VISION, CLIP_TEXT)
