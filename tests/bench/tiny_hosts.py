"""Hosts of two thin layers, so that a measurement takes a moment."""

from __future__ import annotations

import torch
from torch import nn

from graftwork.bench.hosts import HOSTS, Host, random_llama


def _llama() -> nn.Module:
    return random_llama(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        vocab_size=64,
        max_position_embeddings=128,
    )


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64
        )
    )


LLAMA = Host(
    name="tiny-llama", about="tiny Llama", make=_llama, vocabulary=64, batch=2, sequence=8, task="causal",
    modules=HOSTS["llama"].modules,
)  # fmt: skip
BERT = Host(
    name="tiny-bert", about="tiny BERT", make=_bert, vocabulary=64, batch=2, sequence=8, task="classes",
    modules=HOSTS["minilm"].modules,
)  # fmt: skip
