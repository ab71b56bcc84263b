"""Tiny random models of every family in the anatomy, and inputs for them: for your tests as well as for ours.

    model = tiny("llama")                       # two layers, width 32, random, eval mode, the same every time
    logits = model(**tiny_batch("llama")).logits

A name is a family (`bert`), or a family and a task (`bert-classification`, `vit-base`). Weights are
larger than a fresh initialisation would make them, and biases and norms are off their neutral values, so
that a wrong mask, a lost bias or a skipped layer shows in the outputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.engine.adapter import Adapter
from graftwork.engine.attach import attach
from graftwork.engine.verbs import adapters, trainable
from graftwork.errors import UnknownName, nearest
from graftwork.reference.technique import Technique

VOCABULARY = 99
IMAGE = 16  # pixels a side
_MEL_BINS, _FRAMES = 8, 28
_CHOICES = 2

_TASKS = {
    "base": "Model",
    "classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "multiple-choice": "ForMultipleChoice",
    "masked": "ForMaskedLM",
    "causal": "ForCausalLM",
}


@dataclass(frozen=True)
class Family:
    """How to build one family: class name prefix, default task suffix, what it reads, its configuration."""

    prefix: str
    default: str
    inputs: str  # "encoder", "decoder", "both" (encoder-decoder), "speech", "image", "pair" (image and text)
    options: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""

    @property
    def config_name(self) -> str:
        return self.config or f"{self.prefix}Config"


_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8}
_WINDOWED = {**_GEMMA, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_MODERN = {
    **_TEXT,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "global_attn_every_n_layers": 2,
    "local_attention": 8,
}
_DEBERTA = {
    **_TEXT,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "type_vocab_size": 0,
}
_DISTIL = {
    "vocab_size": VOCABULARY,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
_OPT = {**_TEXT, "ffn_dim": 64, "init_std": 0.1, "word_embed_proj_dim": 32}
_BLOOM = {**_TEXT, "n_layer": 2, "n_head": 4}
_FALCON = {**_TEXT, "alibi": True, "new_decoder_architecture": False, "multi_query": False}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "init_std": 0.1,
}
_WHISPER = {
    **{key: value for key, value in _BART.items() if key != "max_position_embeddings"},
    "num_mel_bins": _MEL_BINS,
    "max_source_positions": _FRAMES // 2,
    "max_target_positions": 64,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": IMAGE,
    "patch_size": 4,
    "num_labels": 5,
    "initializer_range": 0.1,
}
_SWIN = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 2,
    "image_size": IMAGE,
    "patch_size": 2,
    "num_labels": 5,
    "initializer_range": 0.1,
    "drop_path_rate": 0.0,
}
_CLIP = {
    "text_config": {**_TEXT, "projection_dim": 32},
    "vision_config": {**_IMAGE, "projection_dim": 32},
    "projection_dim": 32,
}
_MAMBA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
_MAMBA2 = {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
_STAGES = {"hidden_sizes": [16, 32], "depths": [2, 2], "num_labels": 5}
_RESNET = {**_STAGES, "embedding_size": 16, "layer_type": "basic"}
_CONVNEXT = {
    **_STAGES,
    "num_stages": 2,
    "patch_size": 2,
    "drop_path_rate": 0.0,
    "layer_scale_init_value": 0.5,
}

FAMILIES: dict[str, Family] = {
    "bert": Family("Bert", "masked", "encoder", _TEXT),
    "roberta": Family("Roberta", "masked", "encoder", _TEXT),
    "xlm-roberta": Family("XLMRoberta", "masked", "encoder", _TEXT),
    "distilbert": Family("DistilBert", "masked", "encoder", _DISTIL),
    "electra": Family("Electra", "masked", "encoder", {**_TEXT, "embedding_size": 16}),
    "modernbert": Family("ModernBert", "masked", "encoder", _MODERN),
    "deberta-v2": Family("DebertaV2", "masked", "encoder", _DEBERTA),
    "gpt2": Family("GPT2", "LMHeadModel", "decoder", _GPT2),
    "gpt-neox": Family("GPTNeoX", "causal", "decoder", _TEXT),
    "opt": Family("OPT", "causal", "decoder", _OPT),
    "bloom": Family("Bloom", "causal", "decoder", _BLOOM),
    "falcon": Family("Falcon", "causal", "decoder", _FALCON),
    "llama": Family("Llama", "causal", "decoder", _GROUPED),
    "mistral": Family("Mistral", "causal", "decoder", {**_GROUPED, "sliding_window": 4}),
    "mixtral": Family(
        "Mixtral", "causal", "decoder", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "qwen2": Family("Qwen2", "causal", "decoder", _GROUPED),
    "qwen3": Family("Qwen3", "causal", "decoder", _GEMMA),
    "gemma": Family("Gemma", "causal", "decoder", _GEMMA),
    "gemma2": Family("Gemma2", "causal", "decoder", _WINDOWED),
    "gemma3": Family("Gemma3", "causal", "decoder", _WINDOWED, config="Gemma3TextConfig"),
    "phi3": Family("Phi3", "causal", "decoder", _GROUPED),
    "t5": Family("T5", "ForConditionalGeneration", "both", _T5),
    "mt5": Family("MT5", "ForConditionalGeneration", "both", _T5),
    "bart": Family("Bart", "ForConditionalGeneration", "both", _BART),
    "whisper": Family("Whisper", "ForConditionalGeneration", "speech", _WHISPER),
    "vit": Family("ViT", "classification", "image", _IMAGE),
    "dinov2": Family("Dinov2", "classification", "image", {**_IMAGE, "mlp_ratio": 2}),
    "swin": Family("Swin", "classification", "image", _SWIN),
    "clip": Family("CLIP", "base", "pair", _CLIP),
    "mamba": Family("Mamba", "causal", "decoder", _MAMBA),
    "mamba2": Family("Mamba2", "causal", "decoder", _MAMBA2),
    "resnet": Family("ResNet", "classification", "image", _RESNET),
    "convnext": Family("ConvNext", "classification", "image", _CONVNEXT),
}


def tiny(name: str, options: Mapping[str, Any] | None = None, seed: int = 0) -> nn.Module:
    """A tiny random transformers model: two layers (or stages of two), width 32, vocabulary 99, eval mode.

    Args:
        name: a family (its usual model: masked, causal or conditional language model, image classifier), or
            `FAMILY-TASK` with TASK one of base, classification, token-classification, question-answering,
            multiple-choice, masked, causal.
        options: values of the configuration to change (`{"num_labels": 3}`).
        seed: of the weights. The global random state is left as it was.
    """
    family, suffix = _parse(name)
    library = importlib.import_module("transformers")
    config = getattr(library, family.config_name)(**{**family.options, **(options or {})})
    names = (suffix, "LMHeadModel") if suffix == _TASKS["causal"] else (suffix,)
    model_class = next((c for n in names if (c := getattr(library, family.prefix + n, None))), None)
    if model_class is None:
        raise UnknownName(f"transformers has no {family.prefix}{suffix}, so {name!r} cannot be made")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        _off_neutral(model)
    return model


def tiny_batch(
    name: str, batch: int = 3, length: int = 7, padding: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs of `tiny(name)`'s forward: token ids (batch, length) or pixels (batch, 3, 16, 16), no labels.

    With `padding`, row 0 of a text batch has two padded positions: at the left for decoders, else at the
    right.
    """
    family, suffix = _parse(name)
    generator = torch.Generator().manual_seed(seed)
    if family.inputs == "image":
        return {"pixel_values": _pixels(batch, generator)}
    if family.inputs == "speech":
        features = torch.randn(batch, _MEL_BINS, _FRAMES, generator=generator)
        return {"input_features": features, "decoder_input_ids": _ids((batch, length), generator)}
    shape = (batch, _CHOICES, length) if suffix == _TASKS["multiple-choice"] else (batch, length)
    inputs = {"input_ids": _ids(shape, generator)}
    if padding:
        inputs |= _padded(inputs["input_ids"], left=family.inputs == "decoder")
    if family.inputs == "pair":
        inputs["pixel_values"] = _pixels(batch, generator)
    if family.inputs == "both" and suffix == "ForConditionalGeneration":
        inputs["decoder_input_ids"] = _ids((batch, max(length - 2, 1)), generator)
    return inputs


def grafted(model: nn.Module, host: str, technique: Technique, **options: Any) -> Adapter:
    """Attach to `tiny(host)`, with its batch (tokens as labels) to calibrate where the technique starts from data, and
    behind the adapters that it reads."""
    companions(model, technique)
    if not technique.needs_data:
        return attach(model, technique, **options)
    dtype = next(model.parameters()).dtype
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny_batch(host).items()}
    labels = {"labels": batch["input_ids"]} if type(model).__name__.endswith("ForCausalLM") else {}
    return attach(model, technique, calibration=[{**batch, **labels}], **options)


def companions(model: nn.Module, technique: Technique) -> None:
    """Attach the adapters that a technique reads (`others`), where they are missing: bottleneck adapters, frozen, with
    the same values every time."""
    from graftwork.techniques.bottleneck_adapter import BottleneckAdapter

    generator = torch.Generator().manual_seed(0)
    for name in technique.others():
        if name in adapters(model):
            continue
        adapter = attach(model, BottleneckAdapter(width=4), name=name, head=False)
        for parameter in adapter.parameters():
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        trainable(model)


def _parse(name: str) -> tuple[Family, str]:
    family, task = name, ""
    while family not in FAMILIES and "-" in family:
        family, _, last = family.rpartition("-")
        task = f"{last}-{task}" if task else last
    if family not in FAMILIES:
        raise UnknownName(f"no tiny model is called {name!r}. {nearest(name, FAMILIES)}")
    if task and task not in _TASKS:
        raise UnknownName(f"{family} has no task {task!r}. {nearest(task, _TASKS)}")
    found = FAMILIES[family]
    suffix = _TASKS.get(task or found.default, found.default)
    if found.inputs == "image" and suffix == "ForSequenceClassification":
        suffix = "ForImageClassification"
    return found, suffix


def _off_neutral(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.05 * torch.randn_like(parameter)


def _ids(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def _pixels(batch: int, generator: torch.Generator) -> Tensor:
    return torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)


def _padded(ids: Tensor, left: bool) -> dict[str, Tensor]:
    ids, mask = ids.clone(), torch.ones_like(ids)
    columns = slice(0, 2) if left else slice(ids.shape[-1] - 2, None)
    if ids.shape[-1] > 2 and ids.shape[0] > 1:
        ids[0, ..., columns], mask[0, ..., columns] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
