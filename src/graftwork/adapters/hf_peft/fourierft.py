"""HF PEFT's FOURIERFT: `fourierft_spectrum` (n_frequency,) per module; the frequencies by their seed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.extras import is_transposed
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.layerwise import (
    TARGETS,
    Layer,
    check_shapes,
    document,
    layers_of,
    named,
    read_layers,
    the_one,
)
from graftwork.adapters.hf_peft.matching import by_pattern
from graftwork.adapters.stored import StoredAdapter
from graftwork.reference.site import Site
from graftwork.techniques.fourierft import FourierFT

LEAVES = {"fourierft_spectrum": "coefficients"}
UNDERSTOOD = (*TARGETS, "n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "bias")
INDIFFERENT = ("fan_in_fan_out", "init_weights")


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT)
    scale, seed = config.number("scaling", 150.0), config.get("random_loc_seed", int, 777)
    counts, most = config.patterns("n_frequency_pattern"), config.number("n_frequency", 1000)

    def layer(site: Site, own: dict[str, Tensor]) -> Layer:
        count = int(by_pattern(counts, site.module, most, config.where))
        check_shapes(site, own, {"coefficients": (count,)}, config.where)
        return Layer(FourierFT(count=count, alpha=scale, seed=seed), own)

    return read_layers(config, tensors, host, LEAVES, layer)


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    found = layers_of(stored, FourierFT, transposed=True)
    scale, seed = the_one(((own.technique.scale, own.technique.seed) for own in found), "scaling and seed")
    counts = {own.path: own.technique.count for own in found}
    most = Counter(counts.values()).most_common(1)[0][0]
    fields = {
        "n_frequency": most,
        "n_frequency_pattern": {path: count for path, count in counts.items() if count != most},
        "scaling": scale,
        "random_loc_seed": seed,
        "bias": "none",
        "fan_in_fan_out": all(is_transposed(own.place) for own in found),
    }
    config, saved = document("FOURIERFT", stored, counts, fields)
    return config, named(found, LEAVES) | saved
