"""HF PEFT's LORA, written: one pair of factors per module, whatever the adapter was made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graftwork.adapters.hf_peft.extras import BIAS, is_transposed
from graftwork.adapters.hf_peft.host import Host
from graftwork.adapters.hf_peft.layerwise import document
from graftwork.adapters.hf_peft.lora import Factors
from graftwork.adapters.hf_peft.matching import exact
from graftwork.adapters.manifest import Place
from graftwork.adapters.stored import StoredAdapter
from graftwork.engine.channels import widen
from graftwork.errors import BadFile
from graftwork.techniques.kasa import KaSA
from graftwork.techniques.lora import LoRA


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf). BitFit needs the host, to whose biases it adds."""
    factors = written_factors(stored) or _silent(stored)
    places = {place.module: place for place in stored.manifest.sites.values()}
    tensors: dict[str, Tensor] = {}
    for path, own in factors.items():
        tensors.update(_leaves(places[path], own))
    lengths = written_magnitudes(stored)
    tensors |= {f"{path}.lora_magnitude_vector.weight": length for path, length in lengths.items()}
    full = written_biases(stored, host)
    tensors |= {f"{path}.{BIAS if path in factors else 'bias'}": bias for path, bias in full.items()}
    rank = Counter(len(own.down) for own in factors.values()).most_common(1)[0][0]
    alpha = Counter(own.alpha for own in factors.values()).most_common(1)[0][0]
    transposed = all(is_transposed(places[path]) for path in factors)
    kinds = _low_rank(stored)
    fields = {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {exact(p): len(own.down) for p, own in factors.items() if len(own.down) != rank},
        "alpha_pattern": {exact(p): _plain(own.alpha) for p, own in factors.items() if own.alpha != alpha},
        "lora_dropout": _dropout(kinds),
        "use_rslora": _stabilised(kinds),
        "use_dora": bool(lengths),
        "bias": _bias_option(full, factors),
        "fan_in_fan_out": transposed,
    }
    config, saved = document("LORA", stored, factors, fields)
    return config, tensors | saved


def written_factors(stored: StoredAdapter) -> dict[str, Factors]:
    """Module path -> factors. Several at one module (parts of a fused projection) become one of their joint
    rank.
    """
    stabilised = _stabilised(_low_rank(stored))
    found: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
    for index, technique in enumerate(stored.manifest.techniques):
        if isinstance(technique, LoRA | KaSA):
            for key, own in stored.of(index).items():
                place = stored.manifest.sites[key]
                if place.parameter != "weight" or own["down"].dim() != 2:
                    raise BadFile(
                        f"{key}: HF PEFT's LoRA takes module weights, not {place.parameter} of experts"
                    )
                for down, up, scale in _pairs(own, technique.scale):
                    wide = widen(up, place.channels, place.fused_width)
                    found.setdefault(place.module, []).append((down, wide, scale))
    return {path: _joined(parts, stabilised) for path, parts in found.items()}


def written_magnitudes(stored: StoredAdapter) -> dict[str, Tensor]:
    """Module path -> DoRA's magnitudes (out,), empty for plain LoRA; a mixture has no place in the format."""
    found: dict[str, Tensor] = {}
    plain = 0
    for index, technique in enumerate(stored.manifest.techniques):
        if isinstance(technique, LoRA | KaSA):
            for key, own in stored.of(index).items():
                place = stored.manifest.sites[key]
                plain += "magnitude" not in own
                if "magnitude" in own and (place.channels is not None or place.module in found):
                    raise BadFile(
                        f"{key}: HF PEFT's DoRA rescales whole modules once, not parts of a projection"
                    )
                if "magnitude" in own:
                    shape = (1, -1, *(1 for _ in place.kernel)) if place.kernel else (-1,)
                    found[place.module] = own["magnitude"].reshape(shape)
    if found and plain:
        raise BadFile("HF PEFT's format holds DoRA or LoRA in one adapter, not both; save them apart")
    return found


def _pairs(own: Mapping[str, Tensor], scale: float) -> list[tuple[Tensor, Tensor, float]]:
    """The trained factors, and the frozen pair that an initialiser took out of the weight: an update of twice the rank
    of the base as it is."""
    up = own["up"] * own["values"] if "values" in own else own["up"]
    pairs = [(own["down"], up, scale)]
    return [*pairs, (own["taken_down"], own["taken_up"], -1.0)] if "taken_down" in own else pairs


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


def _low_rank(stored: StoredAdapter) -> list[LoRA | KaSA]:
    return [t for t in stored.manifest.techniques if isinstance(t, LoRA | KaSA)]


def _dropout(kinds: list[LoRA | KaSA]) -> float:
    rates = {technique.dropout for technique in kinds} or {0.0}
    if len(rates) > 1:
        raise BadFile(f"HF PEFT has one dropout for all of an adapter, this one has {sorted(rates)}")
    return rates.pop()


def _stabilised(kinds: list[LoRA | KaSA]) -> bool:
    return bool(kinds) and all(isinstance(kind, LoRA) and kind.stabilised for kind in kinds)


def _plain(number: float) -> float:
    return int(number) if float(number).is_integer() else number
