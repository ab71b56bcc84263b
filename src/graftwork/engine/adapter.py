"""An adapter: one or several techniques on a model, with a name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.engine.seat import Graft
from graftwork.errors import BadFile, nearest
from graftwork.reference.card import Card
from graftwork.reference.properties import Port
from graftwork.reference.site import Site
from graftwork.reference.technique import Technique


@dataclass(frozen=True)
class Placed:
    """One module of an adapter and where it sits."""

    index: int
    site: Site
    port: Port
    graft: Graft
    prefix: str


def _looks_back(place: Placed) -> bool:
    return place.port is Port.HIDDEN and not place.graft.card.token_wise and place.site.causal


class Adapter:
    """What `attach` returns: the techniques, their sites and modules.

    Attributes:
        name: unique on its model.
        techniques: in the order given; a fresh task head is the last of them.
        placed: every module with its site, port and tensor-name prefix.
        host_parameters: number of values of the model it was attached to.
        looks_back: the first graft that mixes a signal's positions in a stack that looks back, None without.
    """

    def __init__(
        self,
        name: str,
        techniques: tuple[Technique, ...],
        placed: tuple[Placed, ...],
        host_parameters: int = 0,
    ) -> None:
        self.name = name
        self.techniques = techniques
        self.placed = placed
        self.host_parameters = host_parameters
        self.looks_back = next((place.graft for place in placed if _looks_back(place)), None)

    @property
    def cards(self) -> tuple[Card, ...]:
        """The card of each technique, overrides included."""
        return tuple(technique.card for technique in self.techniques)

    @property
    def card(self) -> Card:
        """The first technique's card."""
        return self.cards[0]

    @property
    def sites(self) -> dict[str, Site]:
        """Site key -> site."""
        return {place.site.key: place.site for place in self.placed}

    @property
    def modules(self) -> dict[tuple[int, str], nn.Module]:
        """(number of the technique, site key) -> module."""
        return {(place.index, place.site.key): place.graft.module for place in self.placed}

    @property
    def trainable(self) -> bool:
        """Whether any of its tensors requires a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of each trainable-by-design tensor once, shared ones once in all."""
        seen: set[int] = set()
        for place in self.placed:
            for name, parameter in place.graft.module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield self.tensor_name(place, name), parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Each parameter once."""
        return (parameter for _, parameter in self.named_parameters())

    def count(self) -> int:
        """Number of trainable values."""
        return sum(parameter.numel() for parameter in self.parameters())

    def summary(self) -> str:
        """What was grafted where, as a table: modules and layers reached, parameters, bytes in a file."""
        from graftwork.engine.summary import table

        return table(self)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds: names such as `3/attention.query.down`, each tensor once."""
        out: dict[str, Tensor] = {}
        for place in self.placed:
            for name, tensor in stored_tensors(place.graft.module).items():
                out.setdefault(self.tensor_name(place, name), tensor.detach())
        return out

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the modules; names and shapes must fit exactly, and nothing changes when they do not."""
        here = {
            self.tensor_name(place, name): tensor
            for place in self.placed
            for name, tensor in place.graft.module.state_dict(keep_vars=True).items()
        }
        _check_fit(self.name, here, tensors)
        with (
            torch.no_grad()
        ):  # through `data` no version would rise, and what was kept of a tensor would stand
            for name, target in here.items():
                target.copy_(tensors[name])

    def tensor_name(self, place: Placed, tensor: str) -> str:
        """What a file calls one tensor of a module."""
        if tensor.startswith("shared."):
            clash = any(p.index < place.index and hasattr(p.graft.module, "shared") for p in self.placed)
            return f"{place.graft.technique}@{tensor}" if clash else tensor
        return f"{place.prefix}.{tensor}"

    def __repr__(self) -> str:
        inside = " + ".join(repr(technique) for technique in self.techniques)
        return f"Adapter({self.name!r}, {inside}, modules={len(self.placed)}, parameters={self.count():,})"


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a file holds of a module: its own say where training scaffolding is dropped, else its state."""
    own = getattr(module, "stored_tensors", None)
    return own() if own is not None else module.state_dict()


def prefixes(keys: list[tuple[str, str]]) -> list[str]:
    """Tensor-name prefixes for (technique name, site key): the key, `technique@key` for a second one there."""
    seen: set[str] = set()
    out = []
    for technique, key in keys:
        prefix, number = key, 2
        if prefix in seen:
            prefix = f"{technique}@{key}"
        while prefix in seen:
            prefix, number = f"{technique}#{number}@{key}", number + 1
        seen.add(prefix)
        out.append(prefix)
    return out


def _check_fit(name: str, here: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    missing, surplus = sorted(here.keys() - given.keys()), sorted(given.keys() - here.keys())
    if missing or surplus:
        lines = [f"tensors do not fit adapter {name!r}:"]
        lines += [f"missing {len(missing)}: {', '.join(missing[:6])}"] if missing else []
        lines += (
            [f"surplus {len(surplus)}: {', '.join(surplus[:6])}. {nearest(surplus[0], here)}"]
            if surplus
            else []
        )
        raise BadFile(" ".join(lines))
    wrong = [
        f"{key} is {tuple(given[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in here.items()
        if tuple(given[key].shape) != tuple(tensor.shape)
    ]
    if wrong:
        raise BadFile(f"shapes do not fit adapter {name!r}: {'; '.join(wrong[:6])}")
