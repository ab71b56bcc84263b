"""Small hosts, one per family, that learn something real from embedded data in minutes on two CPU cores.

The text hosts read docstrings and help topics (`docstrings:text`); the image hosts learn the digits 0 to 4
(`digits:low`), so that 5 to 9 are a real transfer. Sizes are chosen for the CPU: Mamba's sequences are short, because
its scan is slow there; the package mambapy (the extra `mamba`) halves the time, and transformers does without it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from transformers import (
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PretrainedConfig,
    ResNetConfig,
    T5Config,
    ViTConfig,
)

VOCABULARY = 2048
SENTINELS = 32  # span markers of the encoder-decoder, on top of the vocabulary
PAD, EOS = 0, 1  # token numbers

_TOKENS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
_FIVE_CLASSES: dict[str, Any] = {"num_labels": 5}
_DECODER_START: dict[str, Any] = {"decoder_start_token_id": PAD}
Objective = Literal["causal", "spans", "images"]


@dataclass(frozen=True, kw_only=True)
class Host:
    """How a small host is built and pretrained.

    Args:
        config: makes the transformers configuration.
        objective: next token, span corruption, or image classes.
        model_class: the transformers Auto class that is pretrained.
        steps, batch, rate: optimiser steps, examples per step, highest learning rate.
        embedding_rate: factor on the rate for embeddings (T5's start far larger than its other weights).
        length: tokens per example, or pixels per side of an image.
    """

    config: Callable[[], PretrainedConfig]
    objective: Objective
    model_class: str
    steps: int
    batch: int
    length: int
    rate: float
    embedding_rate: float = 1.0

    def recipe(self) -> dict[str, Any]:
        """Everything that decides the weights, as plain values."""
        return asdict(self) | {"config": self.config().to_dict()}


def _llama() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **_TOKENS,
    )


def _gpt2() -> PretrainedConfig:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=512,
        n_embd=192,
        n_layer=6,
        n_head=6,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_TOKENS,
    )


def _t5() -> PretrainedConfig:
    return T5Config(
        vocab_size=VOCABULARY + SENTINELS,
        d_model=160,
        d_kv=32,
        d_ff=448,
        num_layers=4,
        num_decoder_layers=4,
        num_heads=5,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        **_DECODER_START,
    )


def _mamba() -> PretrainedConfig:
    return MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        state_size=8,
        num_hidden_layers=4,
        use_mambapy=True,
        **_TOKENS,
    )


def _vit() -> PretrainedConfig:
    return ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=768,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **_FIVE_CLASSES,
    )


def _resnet() -> PretrainedConfig:
    return ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 256],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        **_FIVE_CLASSES,
    )


def _text(config: Callable[[], PretrainedConfig], objective: Objective, steps: int, **other: Any) -> Host:
    model_class = "AutoModelForSeq2SeqLM" if objective == "spans" else "AutoModelForCausalLM"
    sizes = {"batch": 8, "length": 128, "rate": 6e-3} | other
    return Host(config=config, objective=objective, model_class=model_class, steps=steps, **sizes)


def _image(config: Callable[[], PretrainedConfig], side: int, steps: int, rate: float) -> Host:
    return Host(
        config=config,
        objective="images",
        model_class="AutoModelForImageClassification",
        steps=steps,
        batch=32,
        length=side,
        rate=rate,
    )


HOSTS: dict[str, Host] = {
    "tiny-llama": _text(_llama, "causal", 400),
    "tiny-gpt2": _text(_gpt2, "causal", 400),
    "tiny-t5": _text(_t5, "spans", 600, rate=5e-3, embedding_rate=10.0),
    "tiny-mamba": _text(_mamba, "causal", 300, length=64),
    "tiny-vit": _image(_vit, 16, 200, 1e-3),
    "tiny-resnet": _image(_resnet, 32, 200, 2e-3),
}
