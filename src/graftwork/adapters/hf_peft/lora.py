"""HF PEFT's LORA: factors per module, ranks and alphas by pattern, biases, whole modules.

`lora_A.weight` (r, in) is `down`, `lora_B.weight` (out, r) is `up`; for embeddings `lora_embedding_A` and
`_B` without `.weight`; for convolutions with the kernel's dimensions. The weight's storage layout
(`fan_in_fan_out`) plays no part.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graftwork.adapters.format import both_directions
from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.extras import (
    BIAS,
    is_transposed,
    read_biases,
    read_saved,
    task_and_modules,
    written_modules,
)
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.keys import pop_leaf
from graftwork.adapters.hf_peft.matching import by_pattern, targeted
from graftwork.adapters.manifest import Place
from graftwork.adapters.stored import StoredAdapter
from graftwork.engine.channels import widen
from graftwork.errors import BadFile
from graftwork.reference.properties import Port
from graftwork.reference.site import Site
from graftwork.techniques.lora import LoRA

UNDERSTOOD = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "init_lora_weights",
)
INDIFFERENT = ("fan_in_fan_out", "megatron_core", "qalora_group_size", "ensure_weight_tying", "loftq_config")
REFUSED = {
    "use_dora": "DoRA is a technique of its own, which is not read yet",
    "lora_bias": "a bias of the second factor has no place in graftwork's LoRA; merge it into the base bias "
    "first",
    "layer_replication": "the model's layers would have to be copied",
    "trainable_token_indices": "single trained tokens are not read; merge them first",
    "target_parameters": "fused expert parameters are not read from this format",
    "use_qalora": "QA-LoRA pools its input",
    "alora_invocation_tokens": "activated LoRA depends on the tokens",
}
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Factors:
    """The two factors of one module in the file's shapes flattened to matrices, and its scale's numerator."""

    down: Tensor
    up: Tensor
    alpha: float


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT, REFUSED)
    _refuse_changed_base(config)
    saved = read_saved(config, tensors, host)
    factors = read_factors(config, tensors)
    _compare_targets(config, host, factors)
    _drop_frozen_copies(config, tensors, host)
    parts = []
    sites = {path: host.site(path, config.where) for path in factors}
    for kind in dict.fromkeys((len(f.down), f.alpha) for f in factors.values()):
        here = [sites[path] for path, f in factors.items() if (len(f.down), f.alpha) == kind]
        for technique, group in host.cover(here, Port.WEIGHT, partial(_technique, config, *kind)):
            parts.append(Part(technique, group, _placed(group, factors, config.where)))
    bias = config.get("bias", str, "none")
    return [*parts, *read_biases(bias, tensors, host, config.where), *saved]


def read_factors(config: Config, tensors: dict[str, Tensor]) -> dict[str, Factors]:
    """Take the factors out of `tensors`; module path -> factors."""
    downs = pop_leaf(tensors, "lora_A.weight") | pop_leaf(tensors, "lora_embedding_A")
    ups = pop_leaf(tensors, "lora_B.weight") | pop_leaf(tensors, "lora_embedding_B")
    report = both_directions(downs, ups)
    if report:
        raise BadFile(f"{config.where}: second factors do not fit the first: {report}")
    return {path: _factors(config, path, downs[path], ups[path]) for path in downs}


def _factors(config: Config, path: str, down: Tensor, up: Tensor) -> Factors:
    if path.endswith("base_layer"):
        raise BadFile(f"{config.where}: {path}: factors of nested modules are not read from this format")
    rank = int(by_pattern(config.patterns("rank_pattern"), path, config.number("r", 8), config.where))
    alpha = by_pattern(config.patterns("alpha_pattern"), path, config.number("lora_alpha", 8), config.where)
    if down.dim() < 2 or up.dim() < 2 or len(down) != rank or up[0].numel() != rank:
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise BadFile(
            f"{config.where}: {path} has factors of shapes {shapes}, the configuration says rank {rank}"
        )
    return Factors(down.flatten(1), up.flatten(1), alpha)


def _technique(config: Config, rank: int, alpha: float, workspaces: tuple[str, ...], layers: Any) -> LoRA:
    return LoRA(
        rank=rank,
        alpha=None if alpha == rank else alpha,
        stabilised=config.get("use_rslora", bool, False),
        dropout=float(config.number("lora_dropout", 0.0)),
        workspaces=workspaces,
        layers=layers,
    )


def _placed(
    group: tuple[Site, ...], factors: Mapping[str, Factors], where: str
) -> dict[tuple[str, str], Tensor]:
    out = {}
    for site in group:
        own = factors[site.module]
        wanted = (site.width_in, site.width_out)
        if (own.down.shape[1], len(own.up)) != wanted:
            grouped = ". Grouped convolutions cannot be read: there its delta is no change of the weight"
            raise BadFile(
                f"{where}: {site.module} takes {own.down.shape[1]} and gives {len(own.up)} channels in the "
                f"file, {wanted[0]} and {wanted[1]} here{grouped if site.kernel else ''}"
            )
        out[site.key, "down"], out[site.key, "up"] = own.down, own.up
    return out


def _refuse_changed_base(config: Config) -> None:
    start = config.document.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGE_THE_BASE):
        raise BadFile(
            f"{config.where}: init_lora_weights={start!r} changed the base weights before training, so the "
            "adapter fits only that changed base. Save it again with path_initial_model_for_weight_conversion"
        )


def _compare_targets(config: Config, host: Host, factors: Mapping[str, Factors]) -> None:
    for path in factors:
        host.module(path, config.where)
    wanted = targeted(config, host.paths)
    report = "" if wanted is None else both_directions(dict.fromkeys(wanted), factors)
    if report:
        raise BadFile(f"{config.where}: target_modules and the file's modules differ: {report}")


def _drop_frozen_copies(config: Config, tensors: dict[str, Tensor], host: Host) -> None:
    """Embeddings among the targets are stored in full too: redundant when equal, another base when not."""
    for path, copy in pop_leaf(tensors, "base_layer.weight").items():
        own = host.stored(path, "weight", config.where)
        if own.shape != copy.shape or not torch.allclose(own.float().cpu(), copy.float(), rtol=2**-7):
            raise BadFile(
                f"{config.where}: the file carries its own weights for {path} (resized or trained with it), "
                "which are not those of this base"
            )


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf). BitFit needs the host, to whose biases it adds."""
    factors = written_factors(stored) or _silent(stored)
    places = {place.module: place for place in stored.manifest.sites.values()}
    tensors: dict[str, Tensor] = {}
    for path, own in factors.items():
        tensors.update(_leaves(places[path], own))
    full = written_biases(stored, host)
    saved = written_modules(stored)
    tensors |= {f"{path}.{BIAS if path in factors else 'bias'}": bias for path, bias in full.items()}
    task, modules = task_and_modules(stored, saved)
    rank = Counter(len(own.down) for own in factors.values()).most_common(1)[0][0]
    alpha = Counter(own.alpha for own in factors.values()).most_common(1)[0][0]
    transposed = all(is_transposed(places[path]) for path in factors)
    kinds = [t for t in stored.manifest.techniques if isinstance(t, LoRA)]
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {_exact(p): len(own.down) for p, own in factors.items() if len(own.down) != rank},
        "alpha_pattern": {_exact(p): _plain(own.alpha) for p, own in factors.items() if own.alpha != alpha},
        "lora_dropout": _dropout(kinds),
        "use_rslora": _stabilised(kinds),
        "use_dora": False,
        "bias": _bias_option(full, factors),
        "fan_in_fan_out": transposed,
        "target_modules": sorted(factors),
        "modules_to_save": modules,
        "inference_mode": True,
    }
    return config, tensors | saved


def written_factors(stored: StoredAdapter) -> dict[str, Factors]:
    """Module path -> factors. Several at one module (parts of a fused projection) become one of their joint
    rank.
    """
    kinds = [t for t in stored.manifest.techniques if isinstance(t, LoRA)]
    stabilised = _stabilised(kinds)
    found: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
    for index, technique in enumerate(stored.manifest.techniques):
        if isinstance(technique, LoRA):
            for key, own in stored.of(index).items():
                place = stored.manifest.sites[key]
                if place.parameter != "weight" or own["down"].dim() != 2:
                    raise BadFile(
                        f"{key}: HF PEFT's LoRA takes module weights, not {place.parameter} of experts"
                    )
                up = widen(own["up"], place.channels, place.fused_width)
                found.setdefault(place.module, []).append((own["down"], up, technique.scale))
    return {path: _joined(parts, stabilised) for path, parts in found.items()}


def _joined(parts: list[tuple[Tensor, Tensor, float]], stabilised: bool) -> Factors:
    scale = parts[0][2]
    down = torch.cat([d for d, _, _ in parts])
    up = torch.cat([u if s == scale else u * (s / scale) for _, u, s in parts], dim=1)
    return Factors(down, up, scale * (len(down) ** 0.5 if stabilised else len(down)))


def _silent(stored: StoredAdapter) -> dict[str, Factors]:
    """A LoRA of rank 1 that does nothing: biases alone need a method to travel with."""
    index = next(i for i, t in enumerate(stored.manifest.techniques) if t.name == "bitfit")
    places = {key: stored.manifest.sites[key] for key in stored.of(index)}
    linear = [
        (key, place) for key, place in places.items() if place.kind == "linear" and place.channels is None
    ]
    if not linear:
        raise BadFile(
            "HF PEFT holds biases beside LoRA only, and none of these biases belongs to a linear layer"
        )
    key, place = linear[0]
    width = len(stored.of(index)[key]["delta"])
    return {place.module: Factors(torch.zeros(1, place.width_in), torch.zeros(width, 1), 1.0)}


def written_biases(stored: StoredAdapter, host: Host | None) -> dict[str, Tensor]:
    """Module path -> full bias, of every BitFit site."""
    full: dict[str, Tensor] = {}
    for index, technique in enumerate(stored.manifest.techniques):
        if technique.name == "bitfit":
            for key, own in stored.of(index).items():
                full[stored.manifest.sites[key].module] = (
                    _bias(stored.manifest.sites[key], host) + own["delta"].float()
                )
    return full


def _bias(place: Place, host: Host | None) -> Tensor:
    if place.channels is not None:
        raise BadFile(f"{place.module}: HF PEFT saves whole biases, not those of a part of a projection")
    if host is None:
        raise BadFile(
            "HF PEFT saves biases in full, graftwork as differences: the base model is needed. Load the "
            "adapter on it "
            'and save with format="hf-peft"'
        )
    return host.stored(place.module, "bias", "the base model").float().cpu()


def _leaves(place: Place, own: Factors) -> dict[str, Tensor]:
    path, down, up = place.module, own.down.contiguous(), own.up.contiguous()
    if place.kind == "embedding":
        return {f"{path}.lora_embedding_A": down, f"{path}.lora_embedding_B": up}
    if place.kernel:
        down = down.reshape(len(down), -1, *place.kernel)
        up = up.reshape(*up.shape, *(1 for _ in place.kernel))
    return {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}


def _bias_option(full: Mapping[str, Tensor], factors: Mapping[str, Factors]) -> str:
    if not full:
        return "none"
    return "lora_only" if full.keys() <= factors.keys() else "all"


def _dropout(kinds: list[LoRA]) -> float:
    rates = {technique.dropout for technique in kinds} or {0.0}
    if len(rates) > 1:
        raise BadFile(f"HF PEFT has one dropout for all of an adapter, this one has {sorted(rates)}")
    return rates.pop()


def _stabilised(kinds: list[LoRA]) -> bool:
    return bool(kinds) and all(technique.stabilised for technique in kinds)


def _exact(path: str) -> str:
    return f"^{re.escape(path)}"


def _plain(number: float) -> float:
    return int(number) if float(number).is_integer() else number
