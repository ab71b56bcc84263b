"""What the layer methods of HF PEFT have in common, a few tensors for each module: from paths to sites, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from torch import Tensor

from graftwork.adapters.format import both_directions
from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.extras import (
    is_transposed,
    read_biases,
    read_saved,
    task_and_modules,
    written_modules,
)
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.keys import pop_leaf
from graftwork.adapters.hf_peft.matching import by_pattern, exact, targeted
from graftwork.adapters.manifest import Place
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import BadFile
from graftwork.reference.properties import Port
from graftwork.reference.site import Kind, Site
from graftwork.reference.technique import Layers, Technique

T = TypeVar("T", bound=Technique)
V = TypeVar("V")

TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
SIZES = ("r", "alpha", "rank_pattern", "alpha_pattern")
INDIFFERENT = ("fan_in_fan_out", "init_weights")


@dataclass(frozen=True)
class Layer:
    """What a file says about one module: a technique that is not placed yet, and its tensors by their names here."""

    technique: Technique
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Written(Generic[T]):
    """One module of an adapter that is to be written."""

    technique: T
    place: Place
    tensors: Mapping[str, Tensor]

    @property
    def path(self) -> str:
        """Of the module."""
        return self.place.module


def read_layers(
    config: Config,
    tensors: dict[str, Tensor],
    host: Host,
    leaves: Mapping[str, str],
    layer: Callable[[Site, dict[str, Tensor]], Layer],
) -> list[Part]:
    """The layers, one technique for those that say the same, then biases and what is saved whole; takes them out of
    `tensors`.

    Args:
        leaves: end of a name in the file -> name of the tensor here.
        layer: what a site and its tensors stand for.
    """
    saved = read_saved(config, tensors, host)
    found: dict[str, dict[str, Tensor]] = {}
    for leaf, name in leaves.items():
        for path, tensor in pop_leaf(tensors, leaf).items():
            found.setdefault(path, {})[name] = tensor
    parts = place_layers(config, host, found, layer)
    biases = read_biases(config.get("bias", str, "none"), tensors, host, config.where)
    return [*parts, *biases, *saved]


def place_layers(
    config: Config, host: Host, found: Mapping[str, V], layer: Callable[[Site, V], Layer]
) -> list[Part]:
    """Techniques that stand for what was found at module paths, one for those that say the same."""
    compare_targets(config, host, found)
    sites = {path: host.site(path, config.where) for path in found}
    made = {path: layer(sites[path], own) for path, own in found.items()}
    parts = []
    for technique in dict.fromkeys(own.technique for own in made.values()):
        here = [sites[path] for path, own in made.items() if own.technique == technique]

        def placed(workspaces: tuple[str, ...], layers: Layers, bare: Technique = technique) -> Technique:
            return replace(bare, workspaces=workspaces, layers=layers)

        for one, group in host.cover(here, Port.WEIGHT, placed):
            own = {(site.key, name): t for site in group for name, t in made[site.module].tensors.items()}
            parts.append(Part(one, group, own))
    return parts


def compare_targets(config: Config, host: Host, found: Iterable[str]) -> None:
    """Stop where the file's modules are not those that the configuration selects in this model."""
    paths = dict.fromkeys(found)
    for path in paths:
        host.module(path, config.where)
    wanted = targeted(config, host.paths)
    report = "" if wanted is None else both_directions(dict.fromkeys(wanted), paths)
    if report:
        raise BadFile(f"{config.where}: target_modules and the file's modules differ: {report}")


def size_of(config: Config, path: str, default: int) -> tuple[int, float]:
    """(rank, alpha) of the module at a path, by the patterns or for all; `default` is HF PEFT's rank."""
    ranks, alphas = config.patterns("rank_pattern"), config.patterns("alpha_pattern")
    rank = by_pattern(ranks, path, config.number("r", default), config.where)
    return int(rank), by_pattern(alphas, path, config.number("alpha", default), config.where)


def check_linear(site: Site, where: str) -> None:
    """BadFile for any other layer."""
    if site.kind is not Kind.LINEAR or site.batch:
        raise BadFile(
            f"{where}: {site.module} is no linear layer; this method is read for linear layers only"
        )


def check_shapes(
    site: Site, own: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """BadFile where a tensor of a layer is missing or does not fit it, by its name here."""
    for name, shape in wanted.items():
        found = tuple(own[name].shape) if name in own else None
        if found != shape:
            raise BadFile(
                f"{where}: {site.module}: {name} has shape {found} in the file, expected {shape} here"
            )


def layers_of(
    stored: StoredAdapter, kind: type[T], *, kernels: bool = False, transposed: bool = False
) -> list[Written[T]]:
    """The modules that techniques of this kind change. HF PEFT has one of them per whole module.

    Args:
        kernels, transposed: whether its method takes convolutions, and layers that store their weight as (in, out).
    """
    found: dict[str, Written[T]] = {}
    for index, technique in enumerate(stored.manifest.techniques):
        if isinstance(technique, kind):
            for key, own in stored.of(index).items():
                place = stored.manifest.sites[key]
                what = _foreign(place, kernels, transposed)
                if place.module in found:
                    what = "two for one module"
                if what:
                    raise BadFile(f"{key}: HF PEFT's {kind.__name__} has no place for {what}")
                found[place.module] = Written(technique, place, own)
    return list(found.values())


def _foreign(place: Place, kernels: bool, transposed: bool) -> str:
    if place.parameter != "weight":
        return f"{place.parameter} of experts"
    if place.channels is not None:
        return "a part of a fused projection"
    if place.kernel and not kernels:
        return "a convolution"
    return f"a {place.host}" if is_transposed(place) and not transposed else ""


def document(
    peft_type: str, stored: StoredAdapter, paths: Iterable[str], own: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, modules saved whole) of a method at these paths with fields of its own."""
    saved = written_modules(stored)
    task, modules = task_and_modules(stored, saved)
    config = {
        "peft_type": peft_type,
        "task_type": task,
        "target_modules": sorted(paths),
        "modules_to_save": modules,
        "inference_mode": True,
        **own,
    }
    return config, saved


def sizes(options: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Module path -> (rank, alpha), as default values and patterns."""
    rank = Counter(rank for rank, _ in options.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in options.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": {exact(path): own for path, (own, _) in options.items() if own != rank},
        "alpha_pattern": {exact(path): own for path, (_, own) in options.items() if own != alpha},
    }


def the_one(values: Iterable[V], what: str) -> V:
    """The value that HF PEFT's configuration has room for once. Raises BadFile where there are several."""
    different = sorted(set(values), key=repr)
    if len(different) != 1:
        raise BadFile(f"HF PEFT has one {what} for all of an adapter, this one has {different}")
    return different[0]


def named(found: Iterable[Written[T]], leaves: Mapping[str, str]) -> dict[str, Tensor]:
    """The modules' tensors as the file names them, by leaf -> name here."""
    return {f"{own.path}.{leaf}": own.tensors[name] for own in found for leaf, name in leaves.items()}
