"""Convolutional networks: ResNet and ConvNeXt."""

from __future__ import annotations

from graftwork.anatomy.anatomy import Anatomy, Stack

_NO_ATTENTION = "a convolutional network has no attention"
_NO_SEQUENCE = "a convolutional network has no sequence of positions"

RESNET = Anatomy(
    families=("resnet",),
    stacks=(
        Stack(
            layers=("encoder.stages.*.layers.*",),
            places={
                "conv": ("shortcut.convolution", "layer.*.convolution"),
                "norm": ("shortcut.normalization", "layer.*.normalization"),
            },
            around={
                "embedding": "embedder.embedder.convolution",
                "norm.final": "embedder.embedder.normalization",
            },
            attention_reason=_NO_ATTENTION,
            sequence=None,
            sequence_reason=_NO_SEQUENCE,
            channel_axis=1,
        ),
    ),
)

CONVNEXT = Anatomy(
    families=("convnext",),
    stacks=(
        Stack(
            layers=("encoder.stages.*.layers.*",),
            places={
                "conv": "dwconv",
                "norm": "layernorm",
                "feedforward.up": "pwconv1",
                "feedforward.down": "pwconv2",
            },
            around={
                "embedding": "embeddings.patch_embeddings",
                "downsample": "encoder.stages.*.downsampling_layer.1",
                "norm.final": ("embeddings.layernorm", "encoder.stages.*.downsampling_layer.0", "layernorm"),
            },
            attention_reason=_NO_ATTENTION,
            sequence=None,
            sequence_reason=_NO_SEQUENCE,
            channel_axis=1,
        ),
    ),
)

ANATOMIES = (RESNET, CONVNEXT)
