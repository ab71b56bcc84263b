"""Starts out of the weight: its largest or smallest directions."""

from __future__ import annotations

from typing import Literal

import torch

from graftwork.engine.modules import planned
from graftwork.errors import BadOption
from graftwork.initialisers import matrices
from graftwork.initialisers.plain import given, kaiming
from graftwork.initialisers.start import Pair, Start, weight_of
from graftwork.reference.site import Site

Truncation = Literal["paper", "published-code", "given"]


def pissa(site: Site, rank: int, scale: float) -> Start:
    """The top singular triplets, halved between the factors: s B A = W_R (Meng et al. 2024, arXiv:2404.02948)."""
    if planned():
        return given(site, rank, scale)
    left, values, right = matrices.top_singular(weight_of(site, rank, "pissa"), rank)
    root = (values / scale).sqrt()
    down, up = root.unsqueeze(-1) * right.mT, left * root.unsqueeze(-2)
    return Start(down, up, taken=(down, scale * up))


def olora(site: Site, rank: int, scale: float) -> Start:
    """The first R columns of Q and rows of the triangle in W = Q T, over s (Büyükakyüz 2024, arXiv:2406.01775)."""
    if planned():
        return given(site, rank, scale)
    q, triangle = matrices.qr(weight_of(site, rank, "olora"), rank)
    return Start(triangle / scale, q, taken=(triangle, q))


def kasa(site: Site, rank: int, scale: float) -> Start:
    """Kaiming and zero beside a weight without its R smallest triplets (Wang et al. 2024, arXiv:2412.06071): the first
    output is the truncated model's."""
    start = kaiming(site, rank, scale)
    return Start(start.down, start.up, taken=truncated(site, rank))


def truncated(site: Site, rank: int, truncation: Truncation = "paper") -> Pair:
    """(down (..., R, I), up (..., O, R)) whose product is what leaves the weight; zeros where it will be filled."""
    smaller = min(site.width_out, site.width_in)
    if rank >= smaller:
        raise BadOption(
            f"rank={rank} at {site.key}, whose matrix is {site.width_out} x {site.width_in}: as many singular "
            f"components are cut as the rank, so at most {smaller - 1}"
        )
    if truncation == "given" or planned():
        return matrices.zeros(site, rank, site.width_in), matrices.zeros(site, site.width_out, rank)
    left, values, right = matrices.bottom_singular(weight_of(site, rank, "kasa"), rank)
    if truncation == "published-code":
        numbers = torch.arange(smaller - rank, smaller, device=values.device)
        values = values.masked_fill(numbers < site.width_in - rank, 0.0)
    return right.mT, left * values.unsqueeze(-2)
