"""FourierFT: a few coefficients of the update's spectrum (Gao et al. 2024, arXiv:2405.03003).

delta = scale Re(ifft2(F)), F (out, in) zero but at `count` random frequencies, the same ones for all matrices of a
shape, whose coefficients are trained. They start at zero, so attaching changes no output (the paper draws them from
N(0, 1)). A file holds the seed of the frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from graftwork.engine.modules import DeltaModule, zeros
from graftwork.engine.seeded import Frozen, generator
from graftwork.errors import BadOption
from graftwork.reference.arithmetic import Arithmetic, Role
from graftwork.reference.card import Card
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import Above, AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class FourierFT(Technique):
    """Update each chosen matrix by the inverse Fourier transform of a sparse spectrum.

    Args:
        count: trained coefficients per matrix.
        alpha: the scale s.
        seed: of the frequencies.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.SPARSE,
        adaptation=Adaptation.REPARAMETERISATION,
        input=Input.WEIGHTS,
        insertion=Insertion.PARALLEL,
        integration=Integration.SCALED_ADDITION,
        workspaces=("attention.query|attention.qkv|ssm.in|conv|linear", "attention.value?|ssm.out?"),
        linear=True,
        identity_at_init=True,
        formula="y = W x + alpha Re(ifft2(F)) x, F sparse",
        parameters="count per matrix",
        citation="Gao et al. 2024, Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, "
        "arXiv:2405.03003",
    )
    arithmetic: ClassVar[Arithmetic] = Arithmetic({"coefficients": Role.CHANGE})

    count: Annotated[int, AtLeast(1)] = 1000
    alpha: Annotated[float, Above(0)] = 150.0
    seed: Annotated[int, AtLeast(0)] = 777

    @property
    def scale(self) -> float:
        return self.alpha

    def fits(self, site: Site) -> bool:
        return site.multiplies

    def build(self, site: Site) -> nn.Module:
        frequencies = site.width_out * site.width_in
        if self.count > frequencies:
            raise BadOption(
                f"{self.name}: count={self.count} is above the {frequencies} frequencies of the "
                f"{site.width_out} x {site.width_in} matrix {site.key}"
            )
        return Spectrum(site, self.count, self.scale)

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        sizes = {site.width_out * site.width_in for site in sites}
        return Frozen({f"of{n}": self.frequencies(n) for n in sizes}, sites[0].device) if sites else None

    def frequencies(self, size: int) -> Tensor:
        """Places in the spectrum of a matrix of `size` values, counted row by row."""
        return torch.randperm(size, generator=generator(self.seed), device="cpu")[: self.count].clone()


class Spectrum(DeltaModule):
    def __init__(self, site: Site, count: int, scale: float) -> None:
        super().__init__()
        self.coefficients = zeros(*site.batch, count)
        self.shape, self.scale = site.shape, scale

    def adopt(self, shared: Frozen) -> None:
        self.shared = shared

    def delta(self) -> Tensor:
        own, size = self.coefficients, self.shape[-2] * self.shape[-1]
        flat = own.new_zeros(*own.shape[:-1], size).index_copy(-1, self.shared[f"of{size}"], own)
        return self.scale * torch.fft.ifft2(flat.view(self.shape)).real
