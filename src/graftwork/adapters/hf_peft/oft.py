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
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.layerwise import (
    INDIFFERENT,
    TARGETS,
    Layer,
    check_linear,
    check_shapes,
    document,
    layers_of,
    read_layers,
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
    "bias",
)
REFUSED = {"coft": "its rotations are cut to a distance at each call; merge it first"}
SERIES_SINCE = (0, 18)
FEWEST = 4  # fewer terms are another series in HF PEFT


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, (*INDIFFERENT, "module_dropout", "eps"), REFUSED)
    shared, terms = config.get("block_share", bool, False), _terms(config)

    def layer(site: Site, own: dict[str, Tensor]) -> Layer:
        check_linear(site, config.where)
        block = (1 + isqrt(1 + 8 * own[LEAF].shape[-1])) // 2
        shape = (1 if shared else site.width_in // block, block * (block - 1) // 2)
        check_shapes(site, own, {LEAF: shape}, config.where)
        technique = OFT(block=block, terms=terms, one_block=shared)
        return Layer(technique, {"skew": own[LEAF] if terms is None else -own[LEAF]})

    return read_layers(config, tensors, host, {LEAF: LEAF}, layer)


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
    found = layers_of(stored, OFT)
    terms = the_one((own.technique.terms for own in found), "series")
    if terms is not None and terms < FEWEST:
        raise BadFile(f"HF PEFT has no series of {terms} terms, the shortest has {FEWEST}")
    fields = {
        "peft_version": "0.18.0",  # whose series is meant
        **_sizes({(own.technique.block, own.place.width_in) for own in found}),
        "block_share": the_one((own.technique.one_block for own in found), "way to share blocks"),
        "coft": False,
        "use_cayley_neumann": terms is not None,
        "num_cayley_neumann_terms": terms or 5,
        "bias": "none",
    }
    config, saved = document("OFT", stored, (own.path for own in found), fields)
    sign = 1 if terms is None else -1
    return config, {f"{own.path}.{LEAF}": sign * own.tensors["skew"] for own in found} | saved


def _sizes(blocks: set[tuple[int, int]]) -> dict[str, int]:
    """The size of all blocks, or their number where only that is the same, from (block, width) of each layer."""
    counts = {width // block for block, width in blocks}
    if len(counts) == 1 and len({block for block, _ in blocks}) > 1:
        return {"r": counts.pop(), "oft_block_size": 0}
    return {"r": 0, "oft_block_size": the_one((block for block, _ in blocks), "block size")}
