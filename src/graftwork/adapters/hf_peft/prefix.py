"""HF PEFT's PREFIX_TUNING: keys and values of all layers in one tensor, `prompt_embeddings` (tokens, layers 2
width).

Seen as (tokens, 2 layers, width), layer i has its keys in row 2i and its values in row 2i+1; in
encoder-decoders, where the rows are repeated once and dealt out four to a layer, in rows 4i and 4i+1 modulo
their number, for the decoder's self-attention. There the prefix stands in the cache, so that the tokens stand
at positions n, n+1, ...; here it stands beside the attention and they stay at 0, 1, ...: with rotary
positions the keys are turned back by n when read and forward when written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.extras import read_saved, task_and_modules, written_modules
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.keys import PROMPT
from graftwork.adapters.hf_peft.prompt import prompt_config, take_prompt
from graftwork.adapters.hf_peft.rotary import turned
from graftwork.adapters.stored import StoredAdapter
from graftwork.anatomy.resolve import select_sites
from graftwork.errors import BadFile
from graftwork.reference.properties import Port
from graftwork.reference.site import Site
from graftwork.techniques.prefix_tuning import PrefixTuning

UNDERSTOOD = (
    "num_virtual_tokens",
    "token_dim",
    "num_layers",
    "num_transformer_submodules",
    "modules_to_save",
)
INDIFFERENT = (
    "num_attention_heads",
    "encoder_hidden_size",
    "init_weights",
    "prefix_projection",  # what the projection writes is stored
)


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT)
    stored = take_prompt(config, tensors)
    saved = read_saved(config, tensors, host)
    length = config.get("num_virtual_tokens", int, 0)
    twice = config.get("num_transformer_submodules", int, 1) == 2
    technique = PrefixTuning(length=max(length, 1), hidden=None, workspaces=_workspaces(twice))
    sites = _sites(host, technique)
    width = sites[0].key_width
    if length < 1 or tuple(stored.shape) != (length, 2 * len(sites) * width):
        raise BadFile(
            f"{config.where}: {PROMPT} has shape {tuple(stored.shape)}; {length} tokens for {len(sites)} "
            f"layers of width {width} need ({length}, {2 * len(sites) * width})"
        )
    rows = stored.reshape(length, 2 * len(sites), width).transpose(0, 1)
    own = {}
    for index, site in enumerate(sites):
        at = row(index, len(sites), twice)
        own[site.key, "key"] = turned(host.model, site, rows[at], -length, config.where)
        own[site.key, "value"] = rows[at + 1].contiguous()
    return [Part(technique, tuple(sites), own), *saved]


def row(layer: int, layers: int, twice: bool) -> int:
    """Where a layer's keys are among the 2 x layers rows; its values follow."""
    return (4 * layer) % (2 * layers) if twice else 2 * layer


def _workspaces(twice: bool) -> tuple[str, ...] | None:
    return ("decoder.attention",) if twice else None


def _sites(host: Host, technique: PrefixTuning) -> list[Site]:
    sites = select_sites(host.model, technique.card.workspaces, technique.layers, port=Port.ATTENTION)
    return sorted(sites, key=lambda site: site.layer or 0)


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf). Needs the host, whose positions the keys are turned by."""
    if host is None:
        raise BadFile(
            "prefixes depend on the base model's positions, which are needed. Load the adapter on it and "
            "save with "
            'format="hf-peft"'
        )
    numbers = [i for i, t in enumerate(stored.manifest.techniques) if isinstance(t, PrefixTuning)]
    if len(numbers) != 1:
        raise BadFile("HF PEFT holds one prefix for all layers, this adapter has several")
    own = stored.of(numbers[0])
    saved = written_modules(stored)
    task, _ = task_and_modules(stored, saved)
    config = prompt_config("PREFIX_TUNING", task, stored)
    twice = config["num_transformer_submodules"] == 2
    sites = _sites(host, PrefixTuning(hidden=None, workspaces=_workspaces(twice)))
    if {site.key for site in sites} != own.keys():
        raise BadFile(
            f"HF PEFT gives a prefix to each of the {len(sites)} layers, this adapter to "
            f"{', '.join(sorted(own))}"
        )
    rows = _rows(host, sites, own, twice)
    config |= {
        "num_virtual_tokens": rows.shape[1],
        "token_dim": rows.shape[2],
        "num_layers": len(sites),
        "num_attention_heads": sites[0].heads,
        "encoder_hidden_size": rows.shape[2],
        "prefix_projection": False,
    }
    return config, {PROMPT: rows.transpose(0, 1).flatten(1).contiguous(), **saved}


def _rows(host: Host, sites: list[Site], own: dict[str, dict[str, Tensor]], twice: bool) -> Tensor:
    filled: dict[int, Tensor] = {}
    for index, site in enumerate(sites):
        key, value = own[site.key]["key"], own[site.key]["value"]
        if key.shape != value.shape:
            raise BadFile(f"{site.key}: HF PEFT needs keys and values of one width")
        turned_key = turned(host.model, site, key, len(key), "the base model")
        at = row(index, len(sites), twice)
        for place, rows in ((at, turned_key), (at + 1, value)):
            if place in filled and not torch.equal(filled[place], rows):
                raise BadFile(
                    f"HF PEFT gives layers {index} and {index - len(sites) // 2} of an encoder-decoder the "
                    "same prefix; in this adapter they differ"
                )
            filled[place] = rows
    empty = torch.zeros_like(filled[0])
    return torch.stack([filled.get(place, empty) for place in range(2 * len(sites))])
