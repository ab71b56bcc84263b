"""The architecture-independent places of a host.

A workspace is written `attention.query`, with the stack in front where a model has several
(`decoder.cross_attention.key`). `attention.*` takes every workspace below `attention`; a preset such as
`all-linear` stands for several; `re:PATTERN` matches module names (whole, by regular expression), for the
expert.
"""

from __future__ import annotations

WORKSPACES: dict[str, str] = {
    "embedding": "token, patch or feature embedding",
    "embedding.position": "learned position embedding or relative position bias",
    "embedding.type": "token-type (segment) embedding",
    "embedding.projection": "projection between embedding width and layer width",
    "inputs": "what the first layer reads: embedded positions of every modality",
    "attention": "self-attention block: read before its projections, changed behind its output projection",
    "attention.query": "query projection (or its part of a fused projection)",
    "attention.key": "key projection",
    "attention.value": "value projection",
    "attention.qkv": "the fused query, key and value projection, as one matrix",
    "attention.output": "output projection",
    "cross_attention": "cross-attention block of a decoder",
    "cross_attention.query": "query projection of cross-attention",
    "cross_attention.key": "key projection of cross-attention",
    "cross_attention.value": "value projection of cross-attention",
    "cross_attention.qkv": "fused query, key and value projection of cross-attention, as one matrix",
    "cross_attention.key_value": "fused key and value projection of cross-attention, as one matrix",
    "cross_attention.output": "output projection of cross-attention",
    "feedforward": "feed-forward block: read before its first projection, changed behind its last",
    "feedforward.gate": "gate projection of a gated feed-forward",
    "feedforward.up": "first (widening) projection",
    "feedforward.gate_up": "fused gate and up projection, as one matrix",
    "feedforward.activation": "the inner activation: what the last projection reads",
    "feedforward.down": "last (narrowing) projection",
    "experts.gate_up": "fused gate and up weights of all experts (experts, out, in)",
    "experts.down": "fused down weights of all experts (experts, out, in)",
    "router": "router of a mixture of experts",
    "layer": "a whole layer's output (the residual stream)",
    "norm": "normalisations inside layers",
    "norm.final": "normalisation outside layers: behind the last, before the first, between stages",
    "ssm.in": "input projection of a state-space block",
    "ssm.conv": "its causal convolution",
    "ssm.x": "projection to step size, B and C",
    "ssm.dt": "step-size projection",
    "ssm.out": "its output projection",
    "conv": "convolution",
    "downsample": "reduction between stages (patch merging, strided convolution)",
    "pooler": "pooling projection",
    "head": "task head (classifier, regression, span)",
    "lm_head": "projection to the vocabulary",
    "lm_head.transform": "layers between the base and the projection to the vocabulary",
    "linear": "a linear layer whose role is not known (discovered)",
    "parameter.NAME": "a bare parameter of that name: a class token, positions, Mamba's `A_log` and `D`",
}

PRESETS: dict[str, tuple[str, ...]] = {
    "attention-only": ("attention.*", "cross_attention.*"),
    "feedforward-only": ("feedforward.gate", "feedforward.up", "feedforward.gate_up", "feedforward.down"),
    "all-linear": (
        "attention.*",
        "cross_attention.*",
        "feedforward.gate",
        "feedforward.up",
        "feedforward.gate_up",
        "feedforward.down",
        "ssm.in",
        "ssm.x",
        "ssm.out",
        "linear",
    ),
}
