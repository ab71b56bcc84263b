"""HF PEFT's ADALORA, read as the LoRA that it is after training: `lora_A` (r, in), `lora_E` (r, 1), `lora_B` (out, r)
of the triplets that stayed, scaled by lora_alpha over the rank at the start. Written are LORA folders.
"""

from __future__ import annotations

from torch import Tensor

from graftwork.adapters.hf_peft import lora
from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.layerwise import TARGETS, Layer, check_linear, check_shapes, read_layers
from graftwork.reference.site import Site
from graftwork.techniques.lora import LoRA

LEAVES = {"lora_A": "down", "lora_B": "up", "lora_E": "values"}
UNDERSTOOD = (*TARGETS, "init_r", "lora_alpha", "lora_dropout", "bias")
INDIFFERENT = (
    *("r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
    *lora.INDIFFERENT,
)
OFFSET = 1e-5  # which HF PEFT adds to the rank


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT, lora.REFUSED)
    first, dropout = config.get("init_r", int, 12), float(config.number("lora_dropout", 0.0))
    alpha = config.number("lora_alpha", 8)
    scale = (alpha if alpha > 0 else first) / (first + OFFSET)

    def layer(site: Site, own: dict[str, Tensor]) -> Layer:
        check_linear(site, config.where)
        rank = len(own.get("values", ()))
        wanted = {"down": (rank, site.width_in), "up": (site.width_out, rank), "values": (rank, 1)}
        check_shapes(site, own, wanted, config.where)
        factors = {"down": own["values"] * own["down"], "up": own["up"]}
        return Layer(LoRA(rank=rank, alpha=scale * rank, dropout=dropout), factors)

    return read_layers(config, tensors, host, LEAVES, layer)
