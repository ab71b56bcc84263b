"""Models shared by the anatomy tests, made once; nothing here may change one."""

import functools

import torch

from graftwork.testing import FAMILIES, tiny

torch.set_num_threads(1)

ALL = tuple(FAMILIES)
# Configurations that bring out what the usual tiny model of a family lacks.
VARIANTS = {
    "bert-cross": ("bert-causal", {"is_decoder": True, "add_cross_attention": True}),
    "gpt2-cross": ("gpt2-base", {"add_cross_attention": True}),
    "deberta-conv": ("deberta-v2-base", {"conv_kernel_size": 3, "embedding_size": 16, "type_vocab_size": 2}),
    "opt-projected": ("opt", {"word_embed_proj_dim": 16}),
    "t5-gated": ("t5", {"feed_forward_proj": "gated-gelu"}),
    "dinov2-gated": ("dinov2", {"use_swiglu_ffn": True}),
    "bert-base": ("bert-base", {}),
    "electra-base": ("electra-base", {}),
    "vit-base": ("vit-base", {}),
    "falcon-sequential": ("falcon-base", {"parallel_attn": False}),
    "falcon-two-norms": ("falcon-base", {"new_decoder_architecture": True, "num_kv_heads": 2}),
}


@functools.cache
def host(name):
    """The tiny model of a family, or a variant of one."""
    known, options = VARIANTS.get(name, (name, {}))
    return tiny(known, options)
