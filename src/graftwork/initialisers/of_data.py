"""Starts out of calibration data: the directions of the inputs, or of the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from graftwork.errors import BadOption
from graftwork.initialisers import matrices
from graftwork.initialisers.plain import given, kaiming
from graftwork.initialisers.start import Start, check_rank
from graftwork.initialisers.statistics import InputDirections, WeightGradient
from graftwork.reference.site import Kind, Site

GAMMA = 16.0


def input_directions(site: Site, rank: int) -> InputDirections:
    """What EVA reads; refused where no signal is multiplied by the site's matrix."""
    if site.kind not in (Kind.LINEAR, Kind.CONVOLUTION):
        reason = "a table is looked up" if site.kind is Kind.EMBEDDING else "its owner routes signals to it"
        raise BadOption(
            f"init='eva' reads the signals that a matrix multiplies; at {site.key} ({site.kind.value}) there is none "
            f"to read: {reason}. Choose other workspaces or another init"
        )
    return InputDirections(min(rank, site.width_in))


def eva(site: Site, rank: int, scale: float) -> Start:
    """A: the first R principal directions of the inputs, B zero (Paischer et al. 2024, arXiv:2410.07170)."""
    if site.statistic is None:
        return kaiming(site, rank, scale)
    assert isinstance(site.statistic, InputDirections)
    found = site.statistic.directions
    if found is None or rank > len(found):
        raise BadOption(
            f"init='eva', rank={rank} at {site.key}: the calibration inputs vary along "
            f"{0 if found is None else len(found)} directions only. "
            "Give more or longer batches, or a lower rank"
        )
    return Start(found[:rank].clone(), matrices.zeros(site, site.width_out, rank))


def weight_gradient(site: Site, rank: int) -> WeightGradient:
    """What LoRA-GA reads."""
    check_rank(site, 2 * rank, "lora-ga", min(site.width_out, site.width_in))
    return WeightGradient()


def lora_ga(site: Site, rank: int, scale: float) -> Start:
    """Singular vectors of the gradient G = U S V^T, so that the first step of B A follows full fine-tuning's (Wang et
    al. 2024, arXiv:2407.05000): A = c V[:, :R]^T, B = c U[:, R:2R] with c = O^(1/4) / sqrt(gamma), gamma = 16."""
    if site.statistic is None:
        return given(site, rank, scale)
    assert isinstance(site.statistic, WeightGradient)
    assert site.statistic.total is not None
    left, values, right = matrices.top_singular(site.statistic.total, 2 * rank)
    if not bool((values[..., 0] > 0).all()):
        raise BadOption(
            f"init='lora-ga' at {site.key}: the loss of the calibration batches does not depend on its weight. Choose "
            "other workspaces or another init"
        )
    size = site.width_out**0.25 / GAMMA**0.5
    down, up = size * right[..., :rank].mT, size * left[..., rank:]
    return Start(down, up, taken=(down, scale * up))


def shared_out(sites: Sequence[Site], rank: int) -> Mapping[str, int]:
    """Ranks by site key: of all sites' directions those that explain most, `rank` a site on average (Paischer et al.
    2024). Of equal ones the first."""
    shares = []
    for site in sites:
        assert isinstance(site.statistic, InputDirections)
        shares.append(site.statistic.explained())
    pooled = torch.cat([share.double().cpu() for share in shares])
    owner = torch.cat([torch.full((len(share),), number) for number, share in enumerate(shares)])
    best = owner[pooled.argsort(descending=True, stable=True)[: rank * len(sites)]]
    counts = torch.bincount(best, minlength=len(sites)).tolist()
    return {site.key: count for site, count in zip(sites, counts, strict=True) if count != rank}
