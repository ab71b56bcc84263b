"""An adapter in memory, as files hold it: what every format is written from and read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from graftwork.adapters.base import BaseIdentity
from graftwork.adapters.manifest import Manifest, Owner, Place
from graftwork.engine.adapter import prefixes
from graftwork.reference.technique import Technique

SHARED = "shared"


@dataclass(frozen=True)
class StoredAdapter:
    """A manifest and the tensors it describes."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]

    def owned(self) -> dict[Owner, Tensor]:
        """The tensors by owner."""
        return {owner: self.tensors[name] for name, owner in self.manifest.tensors.items()}

    def of(self, technique: int) -> dict[str, dict[str, Tensor]]:
        """One technique's tensors: site key -> own name -> tensor."""
        found: dict[str, dict[str, Tensor]] = {}
        for owner, tensor in self.owned().items():
            if owner.technique == technique:
                found.setdefault(owner.key, {})[owner.name] = tensor
        return found


def assemble(
    name: str,
    techniques: tuple[Technique, ...],
    owned: Mapping[Owner, Tensor],
    sites: Mapping[str, Place],
    base: BaseIdentity,
    task: str = "",
    labels: Mapping[int, str] | None = None,
) -> StoredAdapter:
    """Name every tensor and describe it.

    A tensor is named by its site's key and its own name, `3/attention.query.down`; where a second technique
    of the adapter stands at the same key, its tensors get its name in front,
    `bitfit@3/attention.query.delta`.
    """
    places = list(dict.fromkeys((owner.technique, owner.key) for owner in owned))
    places.sort(key=lambda place: place[0])
    fronts = dict(zip(places, prefixes([(techniques[i].name, key) for i, key in places]), strict=True))
    names = {owner: f"{fronts[owner.technique, owner.key]}.{owner.name}" for owner in owned}
    owners = {names[owner]: owner for owner in owned}
    manifest = Manifest(name, techniques, sites, owners, base, task, labels)
    return StoredAdapter(manifest, {names[owner]: tensor for owner, tensor in owned.items()})
