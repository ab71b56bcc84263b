"""HF PEFT's OFT: `oft_R.weight` (blocks, block (block - 1) / 2), the entries above the diagonals.

Its exact rotation turns as graftwork's does, its series (the default) turns the other way, so that the entries change
their sign. The size of the blocks is told by the tensors: HF PEFT takes another one than was asked for where that does
not divide the width.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.extras import read_biases, read_saved
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.keys import pop_leaf
from graftwork.adapters.hf_peft.layerwise import (
    INDIFFERENT,
    TARGETS,
    Layer,
    check_shape,
    document,
    layers,
    stored_layers,
    the_one,
)
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import BadFile
from graftwork.reference.site import Site
from graftwork.techniques.oft import OFT

LEAF = "oft_R.weight"
UNDERSTOOD = (
    *TARGETS,
    "r",
    "oft_block_size",
    "block_share",
    "use_cayley_neumann",
    "num_cayley_neumann_terms",
)
REFUSED = {"coft": "its rotations are cut to a distance at each call; merge it first"}
SERIES_SINCE = (0, 18)
FEWEST = 4  # fewer terms are another series in HF PEFT


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, (*INDIFFERENT, "module_dropout", "eps"), REFUSED)
    saved = read_saved(config, tensors, host)
    entries = pop_leaf(tensors, LEAF)
    shared, terms = config.get("block_share", bool, False), _terms(config)

    def layer(path: str, site: Site) -> Layer:
        own = entries[path]
        block = (1 + isqrt(1 + 8 * own.shape[-1])) // 2
        count = 1 if shared else site.width_in // block
        check_shape(path, LEAF, own, (count, block * (block - 1) // 2), config.where)
        options = (("block", block), ("terms", terms), ("one_block", shared))
        return Layer(options, {"skew": own if terms is None else -own})

    parts = layers(OFT.name, config, host, entries, layer)
    biases = read_biases(config.get("bias", str, "none"), tensors, host, config.where)
    return [*parts, *biases, *saved]


def _terms(config: Config) -> int | None:
    if not config.get("use_cayley_neumann", bool, True):
        return None
    if _version(config) < SERIES_SINCE:
        raise BadFile(
            f"{config.where}: its series is that of HF PEFT before 0.18, which was another one; train it again, or "
            "merge it with that version"
        )
    terms = config.get("num_cayley_neumann_terms", int, 5)
    if terms < FEWEST - 1:
        raise BadFile(f"{config.where}: num_cayley_neumann_terms={terms} is no series of a rotation")
    return max(terms, FEWEST)  # HF PEFT's 3 has four terms


def _version(config: Config) -> tuple[int, ...]:
    """(major, minor) of the HF PEFT that wrote the file, (0, 0) where it does not say."""
    parts = config.get("peft_version", str, "0.0").split(".")[:2]
    return tuple(int(part) if part.isdecimal() else 0 for part in parts)


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    found = stored_layers(stored, OFT)
    terms = the_one((technique.terms for technique, _, _ in found), "series")
    if terms is not None and terms < FEWEST:
        raise BadFile(f"HF PEFT has no series of {terms} terms, the shortest has {FEWEST}")
    own = {
        "peft_version": "0.18.0",  # whose series is meant
        **_sizes({(technique.block, place.width_in) for technique, place, _ in found}),
        "block_share": the_one((technique.one_block for technique, _, _ in found), "way to share blocks"),
        "coft": False,
        "use_cayley_neumann": terms is not None,
        "num_cayley_neumann_terms": terms or 5,
    }
    config, saved = document("OFT", stored, (place for _, place, _ in found), own)
    sign = 1 if terms is None else -1
    return config, {f"{p.module}.{LEAF}": sign * t["skew"] for _, p, t in found} | saved


def _sizes(blocks: set[tuple[int, int]]) -> dict[str, int]:
    """The size of all blocks, or their number where only that is the same, from (block, width) of each layer."""
    counts = {width // block for block, width in blocks}
    if len(counts) == 1 and len({block for block, _ in blocks}) > 1:
        return {"r": counts.pop(), "oft_block_size": 0}
    return {"r": 0, "oft_block_size": the_one((block for block, _ in blocks), "block size")}
