"""Adapters made by peft give the same answers here, and adapters written here the same in peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_hosts import gap, host, loaded_by_peft, logits, made_by_peft, no_warnings, randomised
from peft_trips import CLOSE, read_by_peft_and_here, read_here_and_written_again

from graftwork.adapters.convert import convert
from graftwork.adapters.store import load, save
from graftwork.engine.attach import attach, detach
from graftwork.errors import BadFile
from graftwork.reference.technique import Technique
from graftwork.techniques.bitfit import BitFit
from graftwork.techniques.fine_tuning import FineTuning
from graftwork.techniques.ia3 import IA3
from graftwork.techniques.loha import LoHa
from graftwork.techniques.lokr import LoKr
from graftwork.techniques.lora import LoRA
from graftwork.techniques.miss import MiSS
from graftwork.techniques.norm_tuning import NormTuning
from graftwork.techniques.p_tuning import PTuning
from graftwork.techniques.prefix_tuning import PrefixTuning
from graftwork.techniques.prompt_tuning import PromptTuning
from graftwork.techniques.vera import VeRA

pytestmark = pytest.mark.slow


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options))


def classifier(**options: Any) -> peft.LoraConfig:
    return lora(**({"task_type": "SEQ_CLS"} | options))


LORAS: dict[str, tuple[str, peft.PeftConfig]] = {
    "list": ("llama", lora(target_modules=["q_proj", "v_proj"])),
    "pattern": ("llama", lora(target_modules=r".*\.layers\.[02]\..*(q|up)_proj")),
    "all-linear": ("llama", lora(target_modules="all-linear")),
    "full paths": (
        "llama",
        lora(target_modules=["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"]),
    ),
    "some layers": ("llama", lora(target_modules=["k_proj"], layers_to_transform=[0, 2])),
    "one layer": ("llama", lora(target_modules=["k_proj"], layers_to_transform=1, layers_pattern="layers")),
    "excluded": (
        "llama",
        lora(target_modules=["q_proj", "k_proj"], exclude_modules=["layers.0.self_attn.q_proj"]),
    ),
    "stabilised": ("llama", lora(target_modules=["o_proj"], use_rslora=True)),
    "rank pattern": ("llama", lora(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2})),
    "both patterns": (
        "llama",
        lora(
            target_modules=["q_proj", "v_proj"],
            rank_pattern={r"layers\.1\..*": 3},
            alpha_pattern={"layers.2.self_attn.v_proj": 9},
            use_rslora=True,
        ),
    ),
    "dropout": ("llama", lora(target_modules=["q_proj"], lora_dropout=0.1)),
    "lm head": ("gpt-neox", lora(target_modules=["query_key_value", "embed_out"])),
    "whole module": ("llama", lora(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "whole norms": ("llama", lora(target_modules=["q_proj"], modules_to_save=["norm"])),
    "transposed": ("gpt2", lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "transposed head": ("gpt2-classifier", classifier(target_modules=["c_attn"], fan_in_fan_out=True)),
    "whole transposed": (
        "gpt2",
        lora(target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["h.1.mlp.c_fc", "wpe"]),
    ),
    "head": ("llama-classifier", classifier(target_modules=["q_proj"])),
    "bert head": ("bert-classifier", classifier(target_modules=["query", "value"])),
    "head of two layers": ("roberta-classifier", classifier(target_modules=["query"])),
    "bias of targets": ("bert-classifier", classifier(target_modules=["query"], bias="lora_only")),
    "every bias": ("bert-classifier", classifier(target_modules=["query"], bias="all")),
    "every bias, no head": ("bert", lora(target_modules=["key"], bias="all", task_type=None)),
    "embedding": ("llama", lora(target_modules=["embed_tokens", "q_proj"])),
    "convolution": ("resnet", lora(target_modules=["convolution"], task_type=None)),
    "encoder-decoder": ("t5", lora(target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM")),
}
IA3S: dict[str, tuple[str, peft.PeftConfig]] = {
    "llama default": ("llama", peft.IA3Config(task_type="CAUSAL_LM")),
    "t5 default": ("t5", peft.IA3Config(task_type="SEQ_2_SEQ_LM")),
    "outputs": (
        "llama",
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]),
    ),
    "pattern": (
        "llama",
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=r".*(k|down)_proj", feedforward_modules=r".*down_proj"
        ),
    ),
    "gpt2": (
        "gpt2",
        peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ),
    "head": (
        "bert-classifier",
        peft.IA3Config(
            task_type="SEQ_CLS", target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]
        ),
    ),
    "convolution": ("resnet", peft.IA3Config(target_modules=["convolution"], feedforward_modules=[])),
}
NORMS: dict[str, tuple[str, peft.PeftConfig]] = {
    "llama": (
        "llama",
        peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm", "norm"]),
    ),
    "bert": ("bert-classifier", peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"])),
    "gpt2": ("gpt2", peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["ln_1", "ln_f"])),
    "t5": ("t5", peft.LNTuningConfig(task_type="SEQ_2_SEQ_LM", target_modules=["layer_norm"])),
    "no norm": ("llama", peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm", "up_proj"])),
}
PROMPTS: dict[str, tuple[str, peft.PeftConfig]] = {
    "llama": ("llama", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "gpt2": ("gpt2", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "head": ("llama-classifier", peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)),
    "t5": ("t5", peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)),
    "bart": ("bart", peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)),
    "bert": ("bert-classifier", peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)),
    "bert tokens": ("bert-tokens", peft.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=5)),
    "p-tuning bert": (
        "bert-classifier",
        peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=5, encoder_hidden_size=8),
    ),
    "p-tuning": (
        "llama",
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=8),
    ),
    "p-tuning t5": (
        "t5",
        peft.PromptEncoderConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, encoder_hidden_size=8),
    ),
    "p-tuning lstm": (
        "gpt2",
        peft.PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=5,
            encoder_hidden_size=8,
            encoder_reparameterization_type="LSTM",
        ),
    ),
}
PREFIXES: dict[str, tuple[str, peft.PeftConfig]] = {
    "llama": ("llama", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "qwen3": ("qwen3", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "layers without positions": (
        "smollm3",
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    ),
    "gpt-neox": ("gpt-neox", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "head": ("llama-classifier", peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)),
    **{
        name: (name, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=5))
        for name, task in {
            "gpt2": "CAUSAL_LM",
            "opt": "CAUSAL_LM",
            "bert-classifier": "SEQ_CLS",
            "bert-tokens": "TOKEN_CLS",
            "roberta-classifier": "SEQ_CLS",
            "t5": "SEQ_2_SEQ_LM",
            "t5-four": "SEQ_2_SEQ_LM",
            "t5-short": "SEQ_2_SEQ_LM",
            "bart": "SEQ_2_SEQ_LM",
        }.items()
    },
    "projected": (
        "llama",
        peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=8
        ),
    ),
}
MATRICES: dict[str, tuple[str, peft.PeftConfig]] = {
    "loha": ("llama", peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "up_proj"])),
    "loha of several sizes": (
        "llama",
        peft.LoHaConfig(
            r=3,
            alpha=5,
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"q_proj": 2},
            alpha_pattern={"v_proj": 7},
        ),
    ),
    "loha, convolution": ("resnet", peft.LoHaConfig(r=2, target_modules=["convolution"])),
    "loha and head": ("bert-classifier", peft.LoHaConfig(task_type="SEQ_CLS", r=3, target_modules=["query"])),
    "lokr": ("llama", peft.LoKrConfig(r=1, alpha=5, target_modules=["q_proj", "up_proj"])),
    "lokr, whole": ("llama", peft.LoKrConfig(r=8, alpha=5, target_modules=["q_proj", "up_proj"])),
    "lokr, factor": ("bert", peft.LoKrConfig(r=2, decompose_factor=2, target_modules=["key", "value"])),
    "lokr, convolution": ("resnet", peft.LoKrConfig(r=1, target_modules=["convolution"])),
    "lokr, whole convolution": ("resnet", peft.LoKrConfig(r=9, target_modules=["convolution"])),
    "vera": ("llama", peft.VeraConfig(r=6, target_modules=["q_proj", "up_proj", "down_proj"])),
    "vera, another seed": (
        "llama",
        peft.VeraConfig(r=6, projection_prng_key=4, target_modules=["q_proj", "v_proj"]),
    ),
    "vera, transposed": ("gpt2", peft.VeraConfig(r=6, fan_in_fan_out=True, target_modules=["c_attn"])),
    "miss": ("llama", peft.MissConfig(r=4, target_modules=["q_proj", "down_proj"])),
    "miss, padded": ("llama", peft.MissConfig(r=5, target_modules=["q_proj", "v_proj"])),
}
MADE_BY_PEFT = {
    f"{kind}: {case}": value
    for kind, cases in {
        "lora": LORAS,
        "ia3": IA3S,
        "matrices": MATRICES,
        "norms": NORMS,
        "prompt": PROMPTS,
        "prefix": PREFIXES,
    }.items()
    for case, value in cases.items()
}


@pytest.mark.parametrize("case", MADE_BY_PEFT)
def test_made_by_peft_read_here_and_written_again(case: str, tmp_path: Path) -> None:
    read_here_and_written_again(*MADE_BY_PEFT[case], tmp_path)


BIASES: dict[str, peft.PeftConfig] = {
    "vera": peft.VeraConfig(r=6, bias="vera_only", target_modules=["query"]),
    "miss": peft.MissConfig(r=4, bias="all", target_modules=["query"]),
    "oft": peft.OFTConfig(oft_block_size=4, bias="oft_only", target_modules=["query"]),
}


@pytest.mark.parametrize("case", BIASES)
def test_biases_are_read_beside_every_layer_method(case: str, tmp_path: Path) -> None:
    wanted = logits(made_by_peft("bert", BIASES[case], tmp_path), "bert")
    model = host("bert")
    load(model, tmp_path)
    assert gap(wanted, logits(model, "bert")) < CLOSE


MADE_HERE: dict[str, tuple[str, tuple[Technique, ...]]] = {
    "lora": ("llama", (LoRA(rank=3, alpha=5, stabilised=True),)),
    "lora and head": ("bert-classifier", (LoRA(rank=3, dropout=0.1),)),
    "lora and the head of two layers": ("roberta-classifier", (LoRA(rank=3),)),
    "parts of a fused projection": (
        "gpt2",
        (LoRA(rank=3, workspaces=("attention.query", "attention.value")),),
    ),
    "interleaved parts": ("gpt-neox", (LoRA(rank=3, workspaces=("attention.query", "attention.value")),)),
    "two ranks and scales": (
        "llama",
        (
            LoRA(rank=3, workspaces=("attention.query",)),
            LoRA(rank=2, alpha=7, workspaces=("attention.query", "feedforward.up"), layers=(0, 2)),
        ),
    ),
    "lora and biases": ("bert", (LoRA(rank=3), BitFit())),
    "biases alone": ("bert-classifier", (BitFit(),)),
    "lora and norms": ("llama", (LoRA(rank=3), NormTuning())),
    "lora and a whole layer": (
        "gpt2",
        (LoRA(rank=3), FineTuning(workspaces=("feedforward.up",), layers=(1,))),
    ),
    "convolutions": ("resnet", (LoRA(rank=3, workspaces=("conv",)),)),
    "embedding": ("llama", (LoRA(rank=3, workspaces=("embedding",)),)),
    "ia3": ("llama", (IA3(),)),
    "ia3, t5": ("t5", (IA3(),)),
    "ia3, parts": ("gpt2", (IA3(),)),
    "ia3 and head": ("bert-classifier", (IA3(),)),
    "loha": ("llama", (LoHa(rank=2, alpha=3),)),
    "loha, two sizes": (
        "llama",
        (
            LoHa(rank=2, workspaces=("attention.query",)),
            LoHa(rank=3, alpha=5, workspaces=("feedforward.up",)),
        ),
    ),
    "lokr": ("llama", (LoKr(rank=1, alpha=2),)),
    "lokr, convolutions": ("resnet", (LoKr(rank=9, workspaces=("conv",)),)),
    "vera and head": ("bert-classifier", (VeRA(rank=6, seed=3),)),
    "miss": ("llama", (MiSS(rank=5),)),
    "norms": ("bert-classifier", (NormTuning(),)),
    "prompt": ("llama", (PromptTuning(length=4),)),
    "prompt and head": ("llama-classifier", (PromptTuning(length=4),)),
    "prompt, t5": ("t5", (PromptTuning(length=4),)),
    "prompt, bert": ("bert-classifier", (PromptTuning(length=4, front=True),)),
    "p-tuning, bert": ("bert-classifier", (PTuning(length=4, hidden=8, front=True),)),
    "p-tuning": ("llama", (PTuning(length=4, hidden=8),)),
    "prefix": ("llama", (PrefixTuning(length=4, hidden=None),)),
    "prefix by MLP": ("qwen3", (PrefixTuning(length=4, hidden=8),)),
    "moved prefix, rotary": ("llama", (PrefixTuning(length=4, hidden=None, shift_positions=3),)),
    **{
        f"moved prefix, {name}": (name, (PrefixTuning(length=4, hidden=8, shift_positions=4),))
        for name in ("gpt2", "opt", "bert-classifier", "roberta-classifier")
    },
    **{
        f"moved prefix, {name}": (
            name,
            (PrefixTuning(length=4, hidden=8, shift_positions=4, workspaces=("decoder.attention",)),),
        )
        for name in ("t5", "t5-four", "t5-short", "bart")
    },
}


@pytest.mark.parametrize("case", MADE_HERE)
def test_made_here_read_by_peft(case: str, tmp_path: Path) -> None:
    read_by_peft_and_here(*MADE_HERE[case], tmp_path)


def test_only_fields_that_matter_are_written_and_metadata_is_theirs(tmp_path: Path) -> None:
    model = host("llama")
    attach(model, LoRA(rank=3), name="fr")
    folder = save(model, tmp_path, format="hf-peft")
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules", "peft_type", "bias"} <= config.keys()
    assert len(config) < 20


def test_default_goes_to_the_folder_itself_as_peft_does(tmp_path: Path) -> None:
    model = host("llama")
    attach(model, LoRA(rank=3))
    assert save(model, tmp_path, format="hf-peft") == tmp_path
    with no_warnings():
        peft.PeftModel.from_pretrained(host("llama"), tmp_path)


@pytest.mark.parametrize("case", ["lora", "lora and head", "ia3, parts", "norms", "convolutions"])
def test_converting_needs_no_base_model(case: str, tmp_path: Path) -> None:
    name, techniques = MADE_HERE[case]
    model = host(name)
    attach(model, techniques, name="fr")
    randomised(model)
    wanted = logits(model, name)
    save(model, tmp_path)
    folder = convert(tmp_path / "fr.safetensors", tmp_path / "theirs", format="hf-peft")
    assert gap(wanted, logits(loaded_by_peft(name, folder), name)) < CLOSE
    config = host(name).config
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path / "base")
    back = convert(folder, tmp_path / "back", format="graftwork", base=str(tmp_path / "base"))
    again = host(name)
    load(again, back)
    assert gap(wanted, logits(again, name)) < CLOSE


@pytest.mark.parametrize(("technique", "said"), [(BitFit(), "biases"), (PrefixTuning(length=2), "positions")])
def test_what_needs_the_base_says_so_when_converted_without(
    technique: Technique, said: str, tmp_path: Path
) -> None:
    model = host("llama" if said == "positions" else "bert")
    attach(model, technique, name="fr")
    save(model, tmp_path)
    with pytest.raises(BadFile, match=said):
        convert(tmp_path, tmp_path / "theirs", format="hf-peft")


def test_detaching_a_loaded_adapter_leaves_the_host_as_it_was(tmp_path: Path) -> None:
    made_by_peft("bert-classifier", LORAS["every bias"][1], tmp_path)
    model, bare = host("bert-classifier"), host("bert-classifier")
    load(model, tmp_path)
    detach(model)
    assert torch.equal(logits(model, "bert-classifier"), logits(bare, "bert-classifier"))
