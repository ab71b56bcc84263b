"""Where a low-rank update starts: random, or taken out of the weight it updates.

    O, I output and input channels, R rank, s the scale of the update

An initialiser answers with factors; where it takes them out of the weight, the module keeps the same product beside
them as a frozen pair that is subtracted. So the base keeps every bit, attaching changes no output, several such
adapters share one base, and what was learned leaves as an ordinary update of twice the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from graftwork.engine.modules import uniform
from graftwork.errors import BadOption
from graftwork.initialisers import matrices
from graftwork.reference.site import Kind, Site


@dataclass(frozen=True)
class Start:
    """Factors (..., R, I) and (..., O, R) to start from; `taken`: s up down is subtracted from the weight."""

    down: Tensor
    up: Tensor
    taken: bool = False


Initialiser = Callable[[Site, int, float], Start]


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


def pissa(site: Site, rank: int, scale: float) -> Start:
    """The top singular triplets, halved between the factors: s B A = W_R (Meng et al. 2024, arXiv:2404.02948)."""
    if matrices.planned():
        return given(site, rank, scale)
    left, values, right = matrices.top_singular(_matrix(site, rank, "pissa"), rank)
    root = (values / scale).sqrt()
    return Start(root.unsqueeze(-1) * right.mT, left * root.unsqueeze(-2), taken=True)


def olora(site: Site, rank: int, scale: float) -> Start:
    """The first R columns of Q and rows of the triangle in W = Q T, over s (Büyükakyüz 2024, arXiv:2406.01775)."""
    if matrices.planned():
        return given(site, rank, scale)
    q, triangle = matrices.qr(_matrix(site, rank, "olora"), rank)
    return Start(triangle / scale, q, taken=True)


def given(site: Site, rank: int, scale: float) -> Start:
    """Zeros with a frozen pair, to be filled: what a file of an adapter with taken factors is read into."""
    down = matrices.zeros(site, rank, site.width_in)
    return Start(down, matrices.zeros(site, site.width_out, rank), taken=True)


TAKING = frozenset({"pissa", "olora"})  # their pair comes with a file, which names "given" instead

INITIALISERS: Mapping[str, Initialiser] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "pissa": pissa,
    "olora": olora,
    "given": given,
}


def _matrix(site: Site, rank: int, name: str) -> Tensor:
    """The site's weight (O, I) in fp32, checked: rank within it, finite."""
    if site.matrix is None:
        raise BadOption(f"init={name!r} reads the weight of {site.key}, which has none")
    smaller = min(site.width_out, site.width_in)
    if rank > smaller:
        raise BadOption(
            f"rank={rank} at {site.key}, whose matrix is {site.width_out} x {site.width_in}: init={name!r} can take "
            f"at most {smaller} directions out of it"
        )
    return matrices.finite(site.matrix(), f"{site.key}: its weight")
