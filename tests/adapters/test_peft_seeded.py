"""FourierFT, SHiRA, RandLoRA and AdaLoRA in HF PEFT's format: what a seed stands for is drawn alike in both."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from peft_hosts import gap, host, loaded_by_peft, logits, made_by_peft, randomised
from peft_trips import (
    CLOSE,
    options_on_the_page,
    read_by_peft_and_here,
    read_here_and_written_again,
    refused_to_write,
)
from safetensors.torch import load_file, save_file
from torch import nn

from graftwork.adapters.hf_peft import adalora, fourierft, randlora, shira
from graftwork.adapters.store import load
from graftwork.engine.verbs import adapters
from graftwork.errors import BadFile
from graftwork.reference.technique import Technique
from graftwork.techniques.adalora import AdaLoRA
from graftwork.techniques.fine_tuning import FineTuning
from graftwork.techniques.fourierft import FourierFT
from graftwork.techniques.randlora import RandLoRA
from graftwork.techniques.shira import SHiRA

LIST = ["q_proj", "up_proj", "down_proj"]  # square, widening, narrowing
SQUARE = ["q_proj"]

MADE_BY_PEFT: dict[str, tuple[str, peft.PeftConfig]] = {
    "fourierft": ("llama", peft.FourierFTConfig(n_frequency=30, scaling=40.0, target_modules=LIST)),
    "fourierft, another seed": (
        "llama",
        peft.FourierFTConfig(n_frequency=30, random_loc_seed=5, target_modules=SQUARE),
    ),
    "fourierft, several counts": (
        "llama",
        peft.FourierFTConfig(n_frequency=30, n_frequency_pattern={"up_proj": 12}, target_modules=LIST),
    ),
    "fourierft, transposed": (
        "gpt2",
        peft.FourierFTConfig(n_frequency=30, fan_in_fan_out=True, target_modules=["c_attn"]),
    ),
    "fourierft and head": (
        "bert-classifier",
        peft.FourierFTConfig(task_type="SEQ_CLS", n_frequency=30, target_modules=["query"]),
    ),
    "shira": ("llama", peft.ShiraConfig(r=2, random_seed=3, target_modules=LIST)),
    "shira without a seed": ("llama", peft.ShiraConfig(r=2, target_modules=LIST)),
    "shira and head": (
        "bert-classifier",
        peft.ShiraConfig(task_type="SEQ_CLS", r=2, random_seed=0, target_modules=["query"]),
    ),
    "randlora": ("llama", peft.RandLoraConfig(r=4, randlora_alpha=4, target_modules=LIST)),
    "randlora, an uneven rank": ("llama", peft.RandLoraConfig(r=5, randlora_alpha=3, target_modules=LIST)),
    "randlora, another seed": (
        "llama",
        peft.RandLoraConfig(r=4, randlora_alpha=4, projection_prng_key=9, target_modules=SQUARE),
    ),
    "randlora, the seed alone": (
        "llama",
        peft.RandLoraConfig(r=4, randlora_alpha=4, save_projection=False, target_modules=LIST),
    ),
    "randlora, transposed": (
        "gpt2",
        peft.RandLoraConfig(r=4, randlora_alpha=4, fan_in_fan_out=True, target_modules=["c_attn"]),
    ),
    "randlora and head": (
        "bert-classifier",
        peft.RandLoraConfig(task_type="SEQ_CLS", r=4, randlora_alpha=4, target_modules=["query"]),
    ),
    "adalora": ("llama", peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=9, target_modules=LIST)),
    "adalora and head": (
        "bert-classifier",
        peft.AdaLoraConfig(task_type="SEQ_CLS", init_r=4, total_step=9, target_modules=["query"]),
    ),
}


@pytest.mark.parametrize("case", MADE_BY_PEFT)
def test_made_by_peft_read_here_and_written_again(case: str, tmp_path: Path) -> None:
    read_here_and_written_again(*MADE_BY_PEFT[case], tmp_path)


MADE_HERE: dict[str, tuple[str, tuple[Technique, ...]]] = {
    "fourierft": ("llama", (FourierFT(count=20, alpha=50.0, seed=3),)),
    "fourierft, two counts and a whole layer": (
        "llama",
        (
            FourierFT(count=20, workspaces=("attention.query",)),
            FourierFT(count=30, workspaces=("attention.value",), layers=(0, 2)),
            FineTuning(workspaces=("feedforward.up",), layers=(1,)),
        ),
    ),
    "shira": ("llama", (SHiRA(rank=2),)),
    "randlora": ("llama", (RandLoRA(rank=3, alpha=3, seed=1, workspaces=("feedforward.*",)),)),
    "randlora and head": ("bert-classifier", (RandLoRA(rank=4, alpha=2),)),
    "adalora": ("llama", (AdaLoRA(total_steps=9, rank=4, target_rank=2),)),
}


@pytest.mark.parametrize("case", MADE_HERE)
def test_made_here_read_by_peft(case: str, tmp_path: Path) -> None:
    read_by_peft_and_here(*MADE_HERE[case], tmp_path)


def test_adalora_that_has_cut_ranks_is_read(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(init_r=8, target_r=6, total_step=4, target_modules=LIST)
    model = peft.get_peft_model(host("llama"), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    randomised(model, 0.1)
    for step in range(1, 5):
        out = model(input_ids=torch.arange(12).view(2, 6) + step, labels=torch.arange(12).view(2, 6))
        out.loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    wanted = logits(loaded_by_peft("llama", tmp_path), "llama")
    ranks = {
        len(t) for name, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_E" in name
    }
    assert len(ranks) > 1, "this is about modules of several ranks"
    ours = host("llama")
    load(ours, tmp_path)
    assert gap(wanted, logits(ours, "llama")) < CLOSE


REFUSED_TO_WRITE: dict[str, tuple[str, tuple[Technique, ...], str]] = {
    "two seeds": (
        "llama",
        tuple(
            SHiRA(rank=1, seed=seed, workspaces=(f"attention.{what}",))
            for seed, what in enumerate(("query", "key"))
        ),
        "one rank and seed for all",
    ),
    "two scales": (
        "llama",
        tuple(
            FourierFT(count=9, alpha=a, workspaces=(f"attention.{what}",))
            for a, what in ((1, "query"), (2, "key"))
        ),
        "one scaling and seed for all",
    ),
    "bases of two widths": (
        "llama",
        tuple(RandLoRA(rank=4, workspaces=(what,)) for what in ("attention.query", "feedforward.up")),
        "one pair of frozen matrices",
    ),
    "Conv1D": ("gpt2", (SHiRA(rank=1, workspaces=("feedforward.up",)),), "no place for a Conv1D"),
    "parts": ("gpt2", (FourierFT(count=5, workspaces=("attention.query",)),), "a part of a fused projection"),
    "convolution": ("resnet", (RandLoRA(rank=2, workspaces=("conv",)),), "no place for a convolution"),
}


@pytest.mark.parametrize("case", REFUSED_TO_WRITE)
def test_what_peft_cannot_hold_is_refused(case: str, tmp_path: Path) -> None:
    refused_to_write(*REFUSED_TO_WRITE[case], tmp_path)


def _refused(folder: Path, text: str) -> None:
    model: nn.Module = host("llama")
    with pytest.raises(BadFile, match=text):
        load(model, folder)
    assert not adapters(model)


def _edited(folder: Path, part: str, **config: object) -> None:
    """Reverse the tensors whose names hold `part`, and change the configuration."""
    path = folder / "adapter_model.safetensors"
    tensors = {name: t.flip(-1).contiguous() if part in name else t for name, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    document = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(document))


def test_a_mask_of_ones_own_is_refused(tmp_path: Path) -> None:
    made_by_peft("llama", MADE_BY_PEFT["shira"][1], tmp_path)
    _edited(tmp_path, "nothing", random_seed=4)
    _refused(tmp_path, "other values than the random ones of seed 4")


def test_other_bases_than_those_of_the_seed_are_refused(tmp_path: Path) -> None:
    made_by_peft("llama", MADE_BY_PEFT["randlora"][1], tmp_path)
    _edited(tmp_path, "randlora_A")
    _refused(tmp_path, "seed 0 gives other frozen matrices")


def test_sparse_bases_are_refused(tmp_path: Path) -> None:
    made_by_peft("llama", peft.RandLoraConfig(r=4, sparse=True, target_modules=SQUARE), tmp_path)
    _refused(tmp_path, "sparse bases are not drawn here")


def test_another_number_of_frequencies_is_refused(tmp_path: Path) -> None:
    made_by_peft("llama", MADE_BY_PEFT["fourierft"][1], tmp_path)
    _edited(tmp_path, "nothing", n_frequency=31)
    _refused(tmp_path, r"has shape \(30,\) in the file, expected \(31,\)")


def test_the_page_names_the_options() -> None:
    options_on_the_page({"FOURIERFT": fourierft, "SHIRA": shira, "RANDLORA": randlora, "ADALORA": adalora})
