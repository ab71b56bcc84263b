"""What the methods with a few tensors for each linear layer have in common: from paths to sites, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from graftwork.adapters.format import both_directions
from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.extras import is_transposed, task_and_modules, written_modules
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.matching import targeted
from graftwork.adapters.manifest import Place
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import BadFile
from graftwork.reference.catalogue import make
from graftwork.reference.properties import Port
from graftwork.reference.site import Kind, Site
from graftwork.reference.technique import Technique

T = TypeVar("T", bound=Technique)

TARGETS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
)
INDIFFERENT = ("fan_in_fan_out", "init_weights")


@dataclass(frozen=True)
class Layer:
    """What a file says about one layer: the technique's options, and its tensors by their own names."""

    options: tuple[tuple[str, Any], ...]
    tensors: Mapping[str, Tensor]


def layers(
    name: str, config: Config, host: Host, paths: Iterable[str], layer: Callable[[str, Site], Layer]
) -> list[Part]:
    """Techniques that stand for the layers at these paths, one for each set of options."""
    sites = {path: host.site(path, config.where) for path in paths}
    wanted = targeted(config, host.paths)
    report = "" if wanted is None else both_directions(dict.fromkeys(wanted), sites)
    if report:
        raise BadFile(f"{config.where}: target_modules and the file's modules differ: {report}")
    found = {path: layer(path, _linear(site, config.where)) for path, site in sites.items()}
    parts = []
    for options in dict.fromkeys(own.options for own in found.values()):
        here = [sites[path] for path, own in found.items() if own.options == options]

        def technique(workspaces: Any, numbers: Any, options: Any = options) -> Technique:
            return make(name, {**dict(options), "workspaces": workspaces, "layers": numbers})

        for one, group in host.cover(here, Port.WEIGHT, technique):
            tensors = {(s.key, own): t for s in group for own, t in found[s.module].tensors.items()}
            parts.append(Part(one, group, tensors))
    return parts


def _linear(site: Site, where: str) -> Site:
    if site.kind is not Kind.LINEAR or site.batch:
        raise BadFile(
            f"{where}: {site.module} is no linear layer; this method is read for linear layers only"
        )
    return site


def check_shape(path: str, leaf: str, tensor: Tensor, wanted: tuple[int, ...], where: str) -> None:
    """BadFile where a tensor of the file does not fit the layer."""
    if tuple(tensor.shape) != wanted:
        raise BadFile(f"{where}: {path}.{leaf} has shape {tuple(tensor.shape)}, expected {wanted} here")


def stored_layers(stored: StoredAdapter, kind: type[T]) -> list[tuple[T, Place, Mapping[str, Tensor]]]:
    """(technique, place, own tensors) of each layer. Raises BadFile for what is no whole linear layer."""
    found: list[tuple[T, Place, Mapping[str, Tensor]]] = []
    for index, technique in enumerate(stored.manifest.techniques):
        if isinstance(technique, kind):
            for key, own in stored.of(index).items():
                place = stored.manifest.sites[key]
                if place.kind != "linear" or place.channels is not None or place.parameter != "weight":
                    raise BadFile(f"{key}: {kind.name} is written for whole linear layers only")
                if is_transposed(place):
                    raise BadFile(f"{key}: HF PEFT's {kind.name} does not adapt a {place.host}")
                found.append((technique, place, own))
    return found


def the_one(values: Iterable[Any], what: str) -> Any:
    """The value that HF PEFT's configuration has room for once."""
    different = sorted(set(values), key=repr)
    if len(different) != 1:
        raise BadFile(f"HF PEFT has one {what} for all of an adapter, this one has {different}")
    return different[0]


def document(
    peft_type: str, stored: StoredAdapter, places: Iterable[Place], own: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, modules saved whole) of a method with these layers and fields of its own."""
    saved, targets = written_modules(stored), list(places)
    task, modules = task_and_modules(stored, saved)
    config = {
        "peft_type": peft_type,
        "task_type": task,
        "target_modules": sorted(place.module for place in targets),
        "bias": "none",
        "modules_to_save": modules,
        "inference_mode": True,
        **own,
    }
    return config, saved
