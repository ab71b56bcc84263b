"""HF PEFT's PROMPT_TUNING and P_TUNING: `prompt_embeddings` (tokens, width) in front of the input.

P-tuning stores what its encoder writes, so both are prompts when read. With two submodules (encoder-decoders)
the file has a second block of rows, which HF PEFT never reads. It puts the prompt before a leading CLS too
(`front`), whose place as the summary the first prompt position then takes.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.extras import read_saved, task_and_modules, written_modules
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.keys import PROMPT
from graftwork.adapters.stored import StoredAdapter
from graftwork.anatomy.resolve import select_sites, stack_of
from graftwork.engine.sequence_facts import facts_of
from graftwork.errors import BadFile
from graftwork.reference.properties import Port
from graftwork.reference.site import Site
from graftwork.reference.technique import Technique
from graftwork.techniques.prompt_tuning import PromptTuning

Prompted = TypeVar("Prompted", bound=Technique)

UNDERSTOOD = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "modules_to_save")
INDIFFERENT = (
    "num_layers",
    "num_attention_heads",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "encoder_reparameterization_type",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_dropout",
)


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT)
    rows = take_prompt(config, tensors)
    saved = read_saved(config, tensors, host)
    length = config.get("num_virtual_tokens", int, 0)
    blocks = blocks_of(config)
    if rows.dim() != 2 or length < 1 or len(rows) not in (length, length * blocks):
        raise BadFile(
            f"{config.where}: {PROMPT} has shape {tuple(rows.shape)}, the configuration says {length} tokens"
        )
    sites, front = sites_for(config, host)
    technique = PromptTuning(length=length, front=front)
    return [Part(technique, sites, {(site.key, "prompt"): rows[:length] for site in sites}), *saved]


def sites_for(config: Config, host: Host) -> tuple[tuple[Site, ...], bool]:
    """Where a prompt goes, and whether before a leading summary position."""
    sites = _sites(host)
    _refuse_other_summary(host, sites, config.task, config.where)
    return sites, _starts_with_summary(host, sites)


def _sites(host: Host) -> tuple[Site, ...]:
    technique = PromptTuning()
    return select_sites(host.model, technique.card.workspaces, technique.layers, port=Port.SEQUENCE)


def _starts_with_summary(host: Host, sites: tuple[Site, ...]) -> bool:
    return any(stack_of(host.model, site).sequence_start for site in sites)


def _refuse_other_summary(host: Host, sites: tuple[Site, ...], task: str | None, where: str) -> None:
    """Refuse a classifier that takes its summary from the stack's output, where prompts are gone here and
    first there."""
    outside = any(facts.keep and facts.front for facts in (facts_of(host.model, site) for site in sites))
    if task == "SEQ_CLS" and outside:
        raise BadFile(
            f"{where}: the head of {type(host.model).__name__} reads the first position that its stack gives, "
            "in HF PEFT the first of the prompt, here the first token; results would differ"
        )


def blocks_of(config: Config) -> int:
    """How many stacks a prompt is for: 2 in encoder-decoders."""
    return config.get("num_transformer_submodules", int, 2 if config.task == "SEQ_2_SEQ_LM" else 1)


def take_prompt(config: Config, tensors: dict[str, Tensor]) -> Tensor:
    """The rows of a prompt method, out of `tensors`."""
    if PROMPT not in tensors:
        raise BadFile(f"{config.where}: the tensor {PROMPT!r} is missing")
    return tensors.pop(PROMPT)


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    technique, own = only_prompt(stored, PromptTuning)
    rows = own["prompt"]
    saved = written_modules(stored)
    task, _ = task_and_modules(stored, saved)
    refuse_other_place(host, task, technique.front)
    config = prompt_config("PROMPT_TUNING", task, stored) | {
        "num_virtual_tokens": len(rows),
        "token_dim": rows.shape[1],
    }
    unused = torch.zeros_like(rows) if config["num_transformer_submodules"] == 2 else rows[:0]
    return config, {PROMPT: torch.cat([rows, unused]), **saved}


def only_prompt(stored: StoredAdapter, kind: type[Prompted]) -> tuple[Prompted, dict[str, Tensor]]:
    """The one prompt of an adapter, and its tensors."""
    found = [
        (technique, own)
        for index, technique in enumerate(stored.manifest.techniques)
        if isinstance(technique, kind)
        for own in stored.of(index).values()
    ]
    if len(found) != 1:
        raise BadFile(f"HF PEFT holds one prompt, this adapter has {len(found)}")
    return found[0]


def refuse_other_place(host: Host | None, task: str | None, front: bool) -> None:
    """Refuse a prompt that HF PEFT would put elsewhere."""
    if host is None:
        raise BadFile(
            "where a prompt goes depends on the base model, which is needed. Load the adapter on it and "
            'save with format="hf-peft"'
        )
    sites = _sites(host)
    _refuse_other_summary(host, sites, task, "the base model")
    if _starts_with_summary(host, sites) and not front:
        raise BadFile(
            f"HF PEFT puts a prompt before the first token, this one stands behind it in a "
            f"{type(host.model).__name__}, whose first position is the summary. Train it with front=True"
        )


def prompt_config(kind: str, task: str | None, stored: StoredAdapter) -> dict[str, Any]:
    """The fields common to prompt methods. BadFile where HF PEFT would not apply the prompt."""
    if task is None:
        raise BadFile(
            f"HF PEFT applies a prompt only under a task type it knows, and asks for a trained head with it; "
            f"{stored.manifest.base.architecture} with this adapter has none"
        )
    twice = task == "SEQ_2_SEQ_LM"
    return {
        "peft_type": kind,
        "task_type": task,
        "num_transformer_submodules": 2 if twice else 1,
        "inference_mode": True,
    }
