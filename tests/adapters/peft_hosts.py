"""Tiny hosts and the adapters that peft makes on them: the independent side of the agreement tests."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftwork.laws import told

logging.getLogger("transformers").setLevel(logging.ERROR)
torch.set_num_threads(1)

ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 40,
}
LLAMA = {**SIZE, **ENDS, "num_key_value_heads": 2}
GPT2 = {**ENDS, "n_embd": 16, "n_layer": 3, "n_head": 4, "vocab_size": 40, "n_positions": 64}
BART_SIDE = {"layers": 3, "attention_heads": 4, "ffn_dim": 32}
T5 = {"d_model": 16, "d_ff": 32, "d_kv": 4, "num_layers": 3, "num_heads": 4, "vocab_size": 40}
BART = {
    **ENDS,
    "d_model": 16,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in BART_SIDE.items()},
}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
    "num_labels": 3,
}
HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-classifier": ("LlamaForSequenceClassification", {**LLAMA, "num_labels": 3}),
    "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 8}),
    "smollm3": ("SmolLM3ForCausalLM", {**LLAMA, "no_rope_layer_interval": 2}),
    "gpt-neox": ("GPTNeoXForCausalLM", {**SIZE, **ENDS}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-classifier": ("GPT2ForSequenceClassification", {**GPT2, "num_labels": 3}),
    "bert": ("BertForMaskedLM", SIZE),
    "bert-classifier": ("BertForSequenceClassification", {**SIZE, "num_labels": 3}),
    "bert-tokens": ("BertForTokenClassification", {**SIZE, "num_labels": 3}),
    "roberta-classifier": ("RobertaForSequenceClassification", {**SIZE, "num_labels": 3}),
    "opt": ("OPTForCausalLM", {**SIZE, **ENDS, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "t5": ("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}),
    "t5-four": ("T5ForConditionalGeneration", {**T5, "num_layers": 4, "decoder_start_token_id": 0}),
    "t5-short": ("T5ForConditionalGeneration", {**T5, "num_decoder_layers": 2, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", BART),
    "resnet": ("ResNetForImageClassification", RESNET),
}
WARNS = ("BOFT", "RANDLORA", "ADALORA")  # of missing keys, of every seed, of its own
SPREAD = 4.0  # initial weights hide errors: larger ones make every token depend on every weight


@cache
def _original(name: str) -> PreTrainedModel:
    kind, options = HOSTS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(SPREAD) if parameter.dim() > 1 else parameter.add_(
                0.1 * torch.randn_like(parameter)
            )
    return model


def host(name: str) -> PreTrainedModel:
    """A fresh copy of a host; always the same weights, in double precision so that only errors differ."""
    return copy.deepcopy(_original(name)).double()


def batch(name: str) -> dict[str, Tensor]:
    """Inputs for a host, without padding."""
    torch.manual_seed(1)
    if name == "resnet":
        return {"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)}
    ids = torch.randint(3, 40, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | (
        {"decoder_input_ids": torch.randint(3, 40, (2, 5))} if name.startswith(("t5", "bart")) else {}
    )


def logits(model: nn.Module, name: str) -> Tensor:
    """The model's answer to its batch."""
    with torch.no_grad(), told(model, batch(name)):
        answer = model(**batch(name)).logits
    return answer[:, -7:] if answer.dim() == 3 else answer  # peft's prompts stay in the answer


def generated(model: Any, name: str) -> Tensor:
    """The scores of eight greedy steps, which differ wherever a token would."""
    inputs = batch(name)
    inputs.pop("decoder_input_ids", None)
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    return torch.stack(out.scores)


def randomised(model: nn.Module, size: float = 0.3) -> nn.Module:
    """Give everything that trains new values, as training would."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return model


def made_by_peft(name: str, config: peft.PeftConfig, folder: Path) -> nn.Module:
    """A trained adapter of peft's on a host, saved to `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = randomised(peft.get_peft_model(host(name), config)).eval()
        model.save_pretrained(folder)  # type: ignore[operator]
    return model


@contextmanager
def no_warnings() -> Iterator[None]:
    """Any warning is an error, but for transformers' own about its future."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Unsupported layer type")  # of every norm that peft adapts
        yield


def loaded_by_peft(name: str, folder: Path) -> nn.Module:
    """The adapter in `folder` on a fresh host, by peft, without a single warning but those it always gives."""
    kind = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    with no_warnings():
        if kind in WARNS:
            warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(host(name), folder).eval()


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference in units of the answers' spread."""
    assert one.shape == other.shape
    finite = torch.isfinite(one)
    assert torch.equal(finite, torch.isfinite(other))
    return float((one[finite] - other[finite]).abs().max() / one[finite].std())
