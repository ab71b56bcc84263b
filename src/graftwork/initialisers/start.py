"""What an initialiser is, and what it answers with.

O, I output and input channels, R rank, s the scale of the update
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.errors import BadOption
from graftwork.initialisers import matrices
from graftwork.reference.site import Site
from graftwork.reference.statistic import Statistic

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Start:
    """Factors (..., R, I) and (..., O, R) to start from; `taken`: a pair (down, up), unscaled, whose product is
    subtracted from the weight for good."""

    down: Tensor
    up: Tensor
    taken: Pair | None = None


@dataclass(frozen=True)
class Initialiser:
    """Where factors start.

    Attributes:
        start: the factors for a site, a rank and a scale.
        stored: the initialiser that a file names instead, where the tensors come with it.
        identity: the first output is the base's.
        gathers: what it reads of calibration data at a site, for a rank.
        shares: how it shares out ranks over sites: site key -> rank, a given rank on average.
        corrects: it starts from what quantisation lost, so it reads the weight from before.
    """

    start: Callable[[Site, int, float], Start]
    stored: str
    identity: bool = True
    gathers: Callable[[Site, int], Statistic] | None = None
    shares: Callable[[Sequence[Site], int], Mapping[str, int]] | None = None
    corrects: bool = False


def register_taken(module: nn.Module, taken: Pair | None) -> None:
    """Keep what a start took, as the module's buffers `taken_down` and `taken_up`; None where it took nothing."""
    for name, tensor in zip(("taken_down", "taken_up"), taken or (None, None), strict=True):
        module.register_buffer(
            name, None if tensor is None else tensor.clone(memory_format=torch.contiguous_format)
        )


def weight_of(site: Site, rank: int, init: str) -> Tensor:
    """The site's weight (..., O, I) in fp32 or better, checked: rank within it, finite."""
    if site.matrix is None or not site.has_matrix:
        raise BadOption(f"init={init!r} reads the weight of {site.key}, which has none")
    check_rank(site, rank, init, min(site.width_out, site.width_in))
    return matrices.finite(site.matrix(), f"{site.key}: its weight")


def check_rank(site: Site, rank: int, init: str, most: int) -> None:
    """Refuse a rank for which the matrix has too few directions."""
    if rank > most:
        raise BadOption(
            f"rank={rank} at {site.key}, whose matrix is {site.width_out} x {site.width_in}: init={init!r} can take "
            f"at most {most} directions out of it"
        )
