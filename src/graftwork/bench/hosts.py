"""Host models to measure on: what they are, one batch for them, and what the peer calls their modules.

B samples, T tokens
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Names = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Host:
    """A model to measure on.

    Attributes:
        name: as the command line spells it.
        about: its sizes, for the head of a table.
        make: builds it in fp32 on the CPU; the same weights every time.
        vocabulary, batch, sequence: of the batch B x T.
        task: "causal" (labels are the tokens) or "classes" (one label of two per sample).
        modules: role -> regular expression of whole module names, for the peer, whose anatomy is the user's to know.
    """

    name: str
    about: str
    make: Callable[[], nn.Module]
    vocabulary: int
    batch: int
    sequence: int
    task: str
    modules: Names

    def batch_of(self, device: str = "cpu") -> dict[str, Tensor]:
        """B x T random tokens with labels; the same every time."""
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(3, self.vocabulary, (self.batch, self.sequence), generator=draw)
        labels = ids if self.task == "causal" else torch.arange(self.batch) % 2
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return {key: value.to(device) for key, value in batch.items()}


def share(model: nn.Module) -> Any:
    """A copy of a frozen model with the same parameters: every variant multiplies by the same memory."""
    memo = {id(p): p for p in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def random_llama(**sizes: int) -> nn.Module:
    """A decoder of Llama's architecture with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    special: dict[str, Any] = {"use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **special))  # type: ignore[arg-type]


_LLAMA_MODULES = {
    "linears": r".*\.(q|k|v|o|gate|up|down)_proj",
    "query-value": r".*\.(q|v)_proj",
    "gates": r".*\.(gate|up)_proj",
    "rescaled": r".*\.(k|v|down)_proj",
    "rescaled-inputs": r".*\.down_proj",
    "norms": r".*norm",
}
_BERT_LAYER = r".*\.layer\.\d+\."
_BERT_MODULES = {
    "linears": _BERT_LAYER
    + r"(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)",
    "query-value": _BERT_LAYER + r"attention\.self\.(query|value)",
    "gates": _BERT_LAYER + r"intermediate\.dense",
    "rescaled": _BERT_LAYER + r"(attention\.self\.(key|value)|output\.dense)",
    "rescaled-inputs": _BERT_LAYER + r"output\.dense",
    "norms": r".*LayerNorm",
}


def _small() -> nn.Module:
    return random_llama(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
        intermediate_size=1376, vocab_size=8192, max_position_embeddings=1024,
    )  # fmt: skip


def _billion() -> nn.Module:
    return random_llama(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=8192, vocab_size=32000, max_position_embeddings=4096,
    )  # fmt: skip


def _minilm() -> nn.Module:
    from graftwork.models.base import load_base

    torch.manual_seed(0)
    return load_base("minilm", task="text-classification", labels=2)[0]


HOSTS = {
    host.name: host
    for host in (
        Host(
            name="llama",
            about="random Llama, hidden 512, 8 layers, heads 8, inner 1376, vocabulary 8192; 4 x 256 tokens",
            make=_small, vocabulary=8192, batch=4, sequence=256, task="causal", modules=_LLAMA_MODULES,
        ),
        Host(
            name="minilm",
            about="MiniLM (BERT, hidden 384, 6 layers, inner 1536) with a head of two classes; 16 x 64 tokens",
            make=_minilm, vocabulary=30000, batch=16, sequence=64, task="classes", modules=_BERT_MODULES,
        ),
        Host(
            name="llama-1b",
            about="random Llama, hidden 2048, 16 layers, heads 32 (8 of keys), inner 8192, vocabulary 32000; "
            "4 x 1024 tokens",
            make=_billion, vocabulary=32000, batch=4, sequence=1024, task="causal", modules=_LLAMA_MODULES,
        ),
    )
}  # fmt: skip
