"""Techniques whose modules start from rank-R factors: what they ask of data, and ranks that differ by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from graftwork.errors import BadOption, UnknownName, nearest
from graftwork.initialisers import INITIALISERS
from graftwork.reference.site import Site
from graftwork.reference.statistic import Statistic
from graftwork.reference.technique import AtLeast, Technique


@dataclass(frozen=True, kw_only=True)
class Initialised(Technique):
    """A technique with a rank and an initialiser."""

    rank: Annotated[int, AtLeast(1)] = 8
    init: str = "kaiming"

    @property
    def needs_data(self) -> bool:
        return INITIALISERS[self.init].gathers is not None

    @property
    def needs_originals(self) -> bool:
        return INITIALISERS[self.init].corrects

    def gathers(self, site: Site) -> Statistic | None:
        gathers = INITIALISERS[self.init].gathers
        return None if gathers is None else gathers(site, self.rank)

    def stored(self) -> Technique:
        return replace(self, init=INITIALISERS[self.init].stored)


@dataclass(frozen=True, kw_only=True)
class Ranked(Initialised):
    """One whose matrices may differ in rank; the scale stays that of `rank`.

    Args:
        rho: with init="eva": at most how many times `rank` a matrix may get where the ranks are shared out anew, by how
            much of its inputs' variance each direction explains; 1 leaves them as they are.
        rank_by_site: site key -> rank, where it is not `rank`; 0 leaves the site out. Found by itself with "eva".
    """

    rho: Annotated[float, AtLeast(1)] = 2.0
    rank_by_site: Mapping[str, Annotated[int, AtLeast(0)]] | None = None

    def rank_at(self, site: Site) -> int:
        """The rank of one matrix."""
        return (self.rank_by_site or {}).get(site.key, self.rank)

    def omits(self, site: Site) -> bool:
        return self.rank_at(site) == 0

    def gathers(self, site: Site) -> Statistic | None:
        start = INITIALISERS[self.init]
        rank = round(self.rank * self.rho) if self._shared_out else self.rank_at(site)
        return None if start.gathers is None else start.gathers(site, rank)

    @property
    def _shared_out(self) -> bool:
        """Whether ranks are still to be found from the data."""
        return INITIALISERS[self.init].shares is not None and self.rank_by_site is None and self.rho > 1

    def resolved(self, sites: Sequence[Site]) -> Technique:
        shares = INITIALISERS[self.init].shares
        if self._shared_out and shares is not None and all(site.statistic for site in sites):
            return replace(self, rank_by_site=shares(sites, self.rank) or None)
        for key in self.rank_by_site or ():
            if key not in {site.key for site in sites}:
                raise UnknownName(
                    f"{self.name}: rank_by_site names {key!r}. {nearest(key, [s.key for s in sites])}"
                )
        if all(self.omits(site) for site in sites):
            raise BadOption(f"{self.name}: rank_by_site leaves out every site that the workspaces select")
        return self
