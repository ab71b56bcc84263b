"""HF PEFT's LORA, read: factors per module, ranks and alphas by pattern, biases, whole modules.

`lora_A.weight` (r, in) is `down`, `lora_B.weight` (out, r) is `up`, `lora_magnitude_vector.weight` holds DoRA's
magnitudes; for embeddings `lora_embedding_A` and
`_B` without `.weight`; for convolutions with the kernel's dimensions. The weight's storage layout
(`fan_in_fan_out`) plays no part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.adapters.format import both_directions
from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.extras import read_biases, read_saved
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.keys import pop_leaf
from graftwork.adapters.hf_peft.layerwise import Layer, place_layers
from graftwork.adapters.hf_peft.matching import by_pattern
from graftwork.errors import BadFile
from graftwork.reference.site import Site
from graftwork.techniques.dora import DoRA
from graftwork.techniques.lora import LoRA

UNDERSTOOD = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "init_lora_weights",
)
INDIFFERENT = (
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "ensure_weight_tying",
    "loftq_config",
    "eva_config",
)
REFUSED = {
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
    """The two factors of one module in the file's shapes flattened to matrices, its scale's numerator, and DoRA's
    magnitudes (out,)."""

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT, REFUSED)
    _refuse_changed_base(config)
    saved = read_saved(config, tensors, host)
    factors = read_factors(config, tensors)

    def layer(site: Site, own: Factors) -> Layer:
        return Layer(_technique(config, own), _fitting(site, own, config.where))

    parts = place_layers(config, host, factors, layer)
    _drop_frozen_copies(config, tensors, host)
    bias = config.get("bias", str, "none")
    return [*parts, *read_biases(bias, tensors, host, config.where), *saved]


def read_factors(config: Config, tensors: dict[str, Tensor]) -> dict[str, Factors]:
    """Take the factors out of `tensors`; module path -> factors."""
    downs = pop_leaf(tensors, "lora_A.weight") | pop_leaf(tensors, "lora_embedding_A")
    ups = pop_leaf(tensors, "lora_B.weight") | pop_leaf(tensors, "lora_embedding_B")
    report = both_directions(downs, ups)
    if report:
        raise BadFile(f"{config.where}: second factors do not fit the first: {report}")
    lengths = pop_leaf(tensors, "lora_magnitude_vector.weight") | pop_leaf(tensors, "lora_magnitude_vector")
    report = both_directions(downs, lengths) if config.get("use_dora", bool, False) or lengths else ""
    if report:
        raise BadFile(f"{config.where}: DoRA's magnitudes do not fit the factors: {report}")
    return {path: _factors(config, path, downs[path], ups[path], lengths.get(path)) for path in downs}


def _factors(config: Config, path: str, down: Tensor, up: Tensor, magnitude: Tensor | None) -> Factors:
    if path.endswith("base_layer"):
        raise BadFile(f"{config.where}: {path}: factors of nested modules are not read from this format")
    rank = int(by_pattern(config.patterns("rank_pattern"), path, config.number("r", 8), config.where))
    alpha = by_pattern(config.patterns("alpha_pattern"), path, config.number("lora_alpha", 8), config.where)
    if down.dim() < 2 or up.dim() < 2 or len(down) != rank or up[0].numel() != rank:
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise BadFile(
            f"{config.where}: {path} has factors of shapes {shapes}, the configuration says rank {rank}"
        )
    return Factors(down.flatten(1), up.flatten(1), alpha, None if magnitude is None else magnitude.flatten())


def _technique(config: Config, own: Factors) -> LoRA:
    kind = DoRA if config.get("use_dora", bool, False) else LoRA
    return kind(
        rank=len(own.down),
        alpha=None if own.alpha == len(own.down) else own.alpha,
        stabilised=config.get("use_rslora", bool, False),
        dropout=float(config.number("lora_dropout", 0.0)),
    )


def _fitting(site: Site, own: Factors, where: str) -> dict[str, Tensor]:
    wanted = (site.width_in, site.width_out)
    if (own.down.shape[1], len(own.up)) != wanted:
        grouped = ". Grouped convolutions cannot be read: there its delta is no change of the weight"
        raise BadFile(
            f"{where}: {site.module} takes {own.down.shape[1]} and gives {len(own.up)} channels in the "
            f"file, {wanted[0]} and {wanted[1]} here{grouped if site.kernel else ''}"
        )
    factors = {"down": own.down, "up": own.up}
    return factors if own.magnitude is None else factors | {"magnitude": own.magnitude}


def _refuse_changed_base(config: Config) -> None:
    start = config.document.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGE_THE_BASE):
        raise BadFile(
            f"{config.where}: init_lora_weights={start!r} changed the base weights before training, so the "
            "adapter fits only that changed base. Save it again with path_initial_model_for_weight_conversion"
        )


def _drop_frozen_copies(config: Config, tensors: dict[str, Tensor], host: Host) -> None:
    """Embeddings among the targets are stored in full too: redundant when equal, another base when not."""
    for path, copy in pop_leaf(tensors, "base_layer.weight").items():
        own = host.stored(path, "weight", config.where)
        if own.shape != copy.shape or not torch.allclose(own.float().cpu(), copy.float(), rtol=2**-7):
            raise BadFile(
                f"{config.where}: the file carries its own weights for {path} (resized or trained with it), "
                "which are not those of this base"
            )
