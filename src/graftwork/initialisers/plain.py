"""Starts that read nothing: random, or empty."""

from __future__ import annotations

from graftwork.engine.modules import uniform
from graftwork.initialisers import matrices
from graftwork.initialisers.start import Start
from graftwork.reference.site import Kind, Site


def kaiming(site: Site, rank: int, scale: float) -> Start:
    """A uniform in +-1/sqrt(I) (Kaiming with a = sqrt 5), B zero; for an embedding A zero and B normal."""
    if site.kind is Kind.EMBEDDING:
        return Start(matrices.zeros(site, rank, site.width_in), matrices.normal(site, site.width_out, rank))
    down = uniform(*site.batch, rank, site.width_in)
    return Start(down.detach(), matrices.zeros(site, site.width_out, rank))


def gaussian(site: Site, rank: int, scale: float) -> Start:
    """A normal with deviation 1/R, B zero (Hu et al. 2021, section 4.1); for an embedding A zero and B normal."""
    if site.kind is Kind.EMBEDDING:
        return kaiming(site, rank, scale)
    down = matrices.normal(site, rank, site.width_in) / rank
    return Start(down, matrices.zeros(site, site.width_out, rank))


def given(site: Site, rank: int, scale: float) -> Start:
    """Zeros with a frozen pair, to be filled: what a file of an adapter with taken factors is read into."""
    down, up = (matrices.zeros(site, rank, site.width_in), matrices.zeros(site, site.width_out, rank))
    return Start(down, up, taken=(down.clone(), up.clone()))
