"""A model as HF PEFT sees it: by module paths. Finds the site of a path and the techniques that cover given
sites.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from graftwork.anatomy.resolve import all_sites, head_sites, select_sites
from graftwork.engine.operations import operation_of
from graftwork.engine.placing import is_adapter_name
from graftwork.engine.seat import stored_parameter
from graftwork.errors import BadFile, GraftworkError, nearest
from graftwork.reference.properties import Port
from graftwork.reference.site import Kind, Side, Site
from graftwork.reference.technique import Layers, Technique

T = TypeVar("T", bound=Technique)
Make = Callable[[tuple[str, ...], Layers], T]


@dataclass(frozen=True)
class Part:
    """What a file says about one technique.

    Attributes:
        sites: where it goes.
        tensors: (site key, own name) -> tensor.
    """

    technique: Technique
    sites: tuple[Site, ...]
    tensors: Mapping[tuple[str, str], Tensor]


class Host:
    """The model that a file is read for; the meta device will do."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites = list({site.key: site for site in (*all_sites(model), *head_sites(model))}.values())
        self.paths = [path for path, _ in model.named_modules() if path and not is_adapter_name(path)]

    def module(self, path: str, where: str) -> nn.Module:
        """The module at a path. Raises BadFile with the nearest paths."""
        if path not in self.paths:
            raise BadFile(
                f"{where}: this {type(self.model).__name__} has no module {path!r}. {self._near(path)}"
            )
        return self.model.get_submodule(path)

    def site(self, path: str, where: str, side: Side = Side.OUTPUT, port: Port = Port.WEIGHT) -> Site:
        """The site that stands for the whole module at a path. Raises BadFile where there is none."""
        self.module(path, where)
        known = [site for site in self.sites if _whole(site, path, side)]
        if not known and side is Side.OUTPUT:
            known = [site for site in self._by_pattern([path], port) if _whole(site, path, side)]
        if not known:
            end = "the input of " if side is Side.INPUT else ""
            raise BadFile(f"{where}: {end}{path} is no workspace of {type(self.model).__name__}")
        return min(known, key=lambda site: not site.weighted)

    def matrix(self, path: str, stored: Tensor, where: str) -> Tensor:
        """A weight in the module's storage layout as the (..., out, in) matrix that techniques see."""
        host = self.module(path, where)
        own = stored_parameter(host, "weight")
        if own is None or tuple(own.shape) != tuple(stored.shape):
            shape = None if own is None else tuple(own.shape)
            raise BadFile(f"{where}: the weight of {path} has shape {tuple(stored.shape)}, here {shape}")
        kind: type = type(host)
        return operation_of(kind).matrix(host, stored).contiguous()

    def parameter(self, path: str, name: str, where: str) -> Tensor:
        """A base parameter itself. Raises BadFile where it does not exist."""
        tensor = stored_parameter(self.module(path, where), name)
        if tensor is None:
            raise BadFile(f"{where}: {path} has no {name} in this model")
        return tensor

    def stored(self, path: str, name: str, where: str) -> Tensor:
        """The values of a base parameter. Raises BadFile where it does not exist or has none."""
        tensor = self.parameter(path, name, where)
        if tensor.is_meta:
            raise BadFile(f"{where}: {path}.{name} of the base is needed, which is not loaded")
        return tensor.detach()

    def parameters(self, path: str) -> list[str]:
        """Full names of all base parameters at and below a path."""
        inside = self.model.get_submodule(path).named_parameters(remove_duplicate=False)
        return [f"{path}.{name}" for name, _ in inside if not is_adapter_name(name)]

    def cover(self, sites: Sequence[Site], port: Port, make: Make[T]) -> list[tuple[T, tuple[Site, ...]]]:
        """Techniques that select exactly these sites: by workspace and layer, else by module name (which
        gives sites other keys), each with the sites it selects."""
        found = []
        for workspaces, layers, group in self._uniform(sites):
            technique = make(workspaces, layers)
            chosen = self._selects(technique, port)
            if {site.key for site in chosen} != {site.key for site in group}:
                technique = make((_pattern(site.module for site in group),), "all")
                chosen = self._selects(technique, port)
                _check_named(technique, chosen, group)
            found.append((technique, chosen))
        return found

    def _selects(self, technique: Technique, port: Port) -> tuple[Site, ...]:
        try:
            sites = select_sites(self.model, technique.card.workspaces, technique.layers, port=port)
        except GraftworkError:
            return ()
        return tuple(site for site in sites if technique.fits(site))

    def _by_pattern(self, paths: Iterable[str], port: Port) -> tuple[Site, ...]:
        try:
            return select_sites(self.model, (_pattern(paths),), "all", port=port)
        except GraftworkError:
            return ()

    def _uniform(self, sites: Sequence[Site]) -> list[tuple[tuple[str, ...], Layers, list[Site]]]:
        """Sites grouped so that each group is a product of workspaces and layers."""
        by_workspace: dict[str, list[Site]] = {}
        for site in sites:
            by_workspace.setdefault(_workspace(site), []).append(site)
        groups: dict[Layers, tuple[list[str], list[Site]]] = {}
        for workspace, members in by_workspace.items():
            names, group = groups.setdefault(self._layers(workspace, members), ([], []))
            names.append(workspace)
            group += members
        return [(tuple(names), layers, group) for layers, (names, group) in groups.items()]

    def _layers(self, workspace: str, members: list[Site]) -> Layers:
        everywhere = {site.layer for site in self.sites if _workspace(site) == workspace}
        here = {site.layer for site in members}
        return "all" if here >= everywhere else tuple(sorted(layer for layer in here if layer is not None))

    def _near(self, path: str) -> str:
        ending = path.rpartition(".")[2]
        return nearest(path, [known for known in self.paths if known.endswith(ending)] or self.paths)


def _check_named(technique: Technique, chosen: Sequence[Site], group: Sequence[Site]) -> None:
    found, wanted = [(s.module, s.side) for s in chosen], [(s.module, s.side) for s in group]
    if sorted(found) != sorted(wanted):
        raise BadFile(
            f"{technique.name} cannot be placed at {', '.join(path for path, _ in wanted)} alone: module "
            f"names select {', '.join(path for path, _ in found) or 'nothing'}"
        )


def _whole(site: Site, path: str, side: Side) -> bool:
    return (
        site.module == path
        and site.side is side
        and site.channels is None
        and site.parameter == "weight"
        and site.entry is None
        and site.kind not in (Kind.BLOCK, Kind.ATTENTION, Kind.STACK)
    )


def _workspace(site: Site) -> str:
    return f"{site.stack}.{site.workspace}" if site.stack else site.workspace


def _pattern(paths: Iterable[str]) -> str:
    return "re:" + "|".join(re.escape(path) for path in paths)
