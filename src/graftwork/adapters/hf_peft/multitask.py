"""HF PEFT's MULTITASK_PROMPT_TUNING: a common prompt and, for each task, two factors of a matrix it is multiplied by.

A file of one task is an adapter; one of several (a source phase) would be several adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graftwork.adapters.hf_peft import prompt
from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.extras import read_saved, task_and_modules, written_modules
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.keys import PROMPT
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import BadFile
from graftwork.techniques.multitask_prompt_tuning import MultitaskPromptTuning

UNDERSTOOD = (*prompt.UNDERSTOOD, "num_tasks", "num_ranks")
INDIFFERENT = (*prompt.INDIFFERENT, "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task")
_COLUMNS, _ROWS = "prefix_task_cols", "prefix_task_rows"


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT)
    tasks, rank = config.get("num_tasks", int, 1), config.get("num_ranks", int, 1)
    if tasks != 1:
        raise BadFile(
            f"{config.where}: one prompt for {tasks} tasks; an adapter here is one task's. Start one task from it "
            "in HF PEFT (prompt_tuning_init EXACT_SOURCE_TASK) and save that"
        )
    length = config.get("num_virtual_tokens", int, 0)
    rows = prompt.take_prompt(config, tensors)
    columns, factors = (tensors.pop(name, torch.empty(0)) for name in (_COLUMNS, _ROWS))
    whole = length * prompt.blocks_of(config)
    if rows.shape[0] != whole or columns.shape != (1, whole, rank) or factors.shape[:2] != (1, rank):
        raise BadFile(
            f"{config.where}: {PROMPT} {tuple(rows.shape)}, {_COLUMNS} {tuple(columns.shape)} and {_ROWS} "
            f"{tuple(factors.shape)} are not those of {length} tokens, one task and rank {rank}"
        )
    saved = read_saved(config, tensors, host)
    sites, front = prompt.sites_for(config, host)
    technique = MultitaskPromptTuning(length=length, rank=rank, front=front)
    own = {"prompt": rows[:length], "columns": columns[0, :length], "rows": factors[0]}
    return [Part(technique, sites, {(s.key, name): own[name] for s in sites for name in own}), *saved]


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    technique, own = prompt.only_prompt(stored, MultitaskPromptTuning)
    saved = written_modules(stored)
    task, _ = task_and_modules(stored, saved)
    prompt.refuse_other_place(host, task, technique.front)
    config = prompt.prompt_config("MULTITASK_PROMPT_TUNING", task, stored) | {
        "num_virtual_tokens": technique.length,
        "token_dim": own["prompt"].shape[1],
        "num_tasks": 1,
        "num_ranks": technique.rank,
        "prompt_tuning_init": "RANDOM",
    }
    blocks = config["num_transformer_submodules"]
    rows, columns = (
        torch.cat([own[name], torch.zeros_like(own[name])][:blocks]) for name in ("prompt", "columns")
    )
    return config, {PROMPT: rows, _COLUMNS: columns[None], _ROWS: own["rows"][None].contiguous(), **saved}
