"""HF PEFT's PREFIX_TUNING: keys and values of all layers in one tensor, `prompt_embeddings` (tokens, layers 2
width).

Seen as (tokens, 2 layers, width), layer i has its keys in row 2i and its values in row 2i+1; in
encoder-decoders, where the rows are repeated once and dealt out four to a layer, in rows 4i and 4i+1 modulo
their number, for the decoder's self-attention alone. Written is an odd number of layers, so that each layer's
rows are its own; what is behind the last is never used. There the prefix stands in the cache, so that the tokens
stand at positions n, n+1, ...; here it stands beside the attention. With rotary positions the keys are turned
back by n when read and forward when written; elsewhere `shift_positions` moves the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.extras import read_saved, task_and_modules, written_modules
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.keys import PROMPT
from graftwork.adapters.hf_peft.prompt import blocks_of, prompt_config, take_prompt
from graftwork.adapters.hf_peft.rotary import shift_of, turned
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
    twice = blocks_of(config) == 2
    sites = _sites(host, twice)
    layers = _layers(stored, length, sites, twice, config.where)
    rows = stored.reshape(length, 2 * layers, -1).transpose(0, 1)
    shift = shift_of(host.model, sites[0], length, config.where)
    own = {}
    for index, site in enumerate(sites):
        at = row(index, layers, twice)
        own[site.key, "key"] = _moved(host, site, rows[at], 0 if shift else -length, config.where)
        own[site.key, "value"] = rows[at + 1].contiguous()
    technique = PrefixTuning(length=length, hidden=None, workspaces=_workspaces(twice), shift_positions=shift)
    return [Part(technique, tuple(sites), own), *saved]


def _layers(stored: Tensor, length: int, sites: list[Site], twice: bool, where: str) -> int:
    """How many layers the file has entries for; a decoder with fewer leaves the last ones unread."""
    width = sites[0].key_width
    layers = stored.shape[-1] // (2 * width)
    fits = layers >= len(sites) if twice else layers == len(sites)
    if length < 1 or not fits or tuple(stored.shape) != (length, 2 * layers * width):
        raise BadFile(
            f"{where}: {PROMPT} has shape {tuple(stored.shape)}; {length} tokens for {len(sites)} "
            f"layers of width {width} need ({length}, {2 * len(sites) * width})"
        )
    return layers


def _moved(host: Host, site: Site, keys: Tensor, steps: int, where: str) -> Tensor:
    return turned(host.model, site, keys, steps, where) if steps else keys.contiguous()


def row(layer: int, layers: int, twice: bool) -> int:
    """Where a layer's keys are among the 2 x layers rows; its values follow."""
    return (4 * layer) % (2 * layers) if twice else 2 * layer


def _workspaces(twice: bool) -> tuple[str, ...] | None:
    return ("decoder.attention",) if twice else None


def _sites(host: Host, twice: bool) -> list[Site]:
    technique = PrefixTuning(hidden=None, workspaces=_workspaces(twice))
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
    technique, own = stored.manifest.techniques[numbers[0]], stored.of(numbers[0])
    assert isinstance(technique, PrefixTuning)
    saved = written_modules(stored)
    task, _ = task_and_modules(stored, saved)
    config = prompt_config("PREFIX_TUNING", task, stored)
    twice = config["num_transformer_submodules"] == 2
    sites = _sites(host, twice)
    if {site.key for site in sites} != own.keys():
        where = ", ".join(_workspaces(twice) or ("attention",))
        raise BadFile(
            f"HF PEFT gives a prefix to {where} of each of the {len(sites)} layers, this adapter to "
            f"{', '.join(sorted(own))}"
        )
    rows = _rows(host, sites, own, twice, _steps(host, sites[0], technique))
    config |= {
        "num_virtual_tokens": rows.shape[1],
        "token_dim": rows.shape[2],
        "num_layers": len(rows) // 2,
        "num_attention_heads": sites[0].heads,
        "encoder_hidden_size": rows.shape[2],
        "prefix_projection": False,
    }
    return config, {PROMPT: rows.transpose(0, 1).flatten(1).contiguous(), **saved}


def _steps(host: Host, site: Site, technique: PrefixTuning) -> int:
    """By how much keys are turned so that HF PEFT's move of the tokens means what this prefix means."""
    length, shift = technique.length, technique.shift_positions
    wanted = shift_of(host.model, site, length, "the base model")
    if wanted not in (0, shift):
        raise BadFile(
            f"HF PEFT has tokens stand {length} positions later, behind the prefix, this prefix {shift}, and "
            f"positions of {type(host.model).__name__} are not rotary, so its keys cannot make up for it. "
            f"Train it with shift_positions={length}"
        )
    return 0 if wanted else length - shift


def _rows(
    host: Host, sites: list[Site], own: dict[str, dict[str, Tensor]], twice: bool, steps: int
) -> Tensor:
    layers = len(sites) | 1 if twice else len(sites)
    filled: dict[int, Tensor] = {}
    for index, site in enumerate(sites):
        key, value = own[site.key]["key"], own[site.key]["value"]
        if key.shape != value.shape:
            raise BadFile(f"{site.key}: HF PEFT needs keys and values of one width")
        at = row(index, layers, twice)
        filled[at], filled[at + 1] = _moved(host, site, key, steps, "the base model"), value
    empty = torch.zeros_like(filled[0])
    return torch.stack([filled.get(place, empty) for place in range(2 * layers)])
