"""What the layer methods of HF PEFT that change a weight have in common: a few tensors per module, all of one rank and
alpha, or of those that patterns give it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from graftwork.adapters.format import both_directions
from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.extras import is_transposed, read_saved, task_and_modules, written_modules
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.keys import pop_leaf
from graftwork.adapters.hf_peft.matching import by_pattern, exact, targeted
from graftwork.adapters.manifest import Place
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import BadFile
from graftwork.reference.properties import Port
from graftwork.reference.technique import Layers, Technique

T = TypeVar("T", bound=Technique)
Make = Callable[[int, float, tuple[str, ...], Layers], Technique]
PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
SIZES = ("r", "alpha", "rank_pattern", "alpha_pattern")


def read_matrices(
    config: Config, tensors: dict[str, Tensor], host: Host, leaves: Mapping[str, str], make: Make, rank: int
) -> list[Part]:
    """One technique per rank and alpha, and what is saved whole; takes what it understands out of `tensors`.

    Args:
        leaves: end of a name in the file -> name of the tensor here.
        make: the technique of a rank and alpha at given workspaces and layers.
        rank: HF PEFT's default.
    """
    saved = read_saved(config, tensors, host)
    found: dict[str, dict[str, Tensor]] = {}
    for leaf, name in leaves.items():
        for path, tensor in pop_leaf(tensors, leaf).items():
            found.setdefault(path, {})[name] = tensor.flatten(1) if tensor.dim() > 2 else tensor
    compare_targets(config, host, found)
    sizes = {path: _size(config, path, rank) for path in found}
    parts = []
    for size in dict.fromkeys(sizes.values()):
        here = [host.site(path, config.where) for path in found if sizes[path] == size]
        for technique, group in host.cover(here, Port.WEIGHT, partial(make, *size)):
            own = {(site.key, name): t for site in group for name, t in found[site.module].items()}
            parts.append(Part(technique, group, own))
    return [*parts, *saved]


def compare_targets(config: Config, host: Host, found: Iterable[str]) -> None:
    """Stop where the file's modules are not those that the configuration selects in this model."""
    paths = dict.fromkeys(found)
    for path in paths:
        host.module(path, config.where)
    wanted = targeted(config, host.paths)
    report = "" if wanted is None else both_directions(dict.fromkeys(wanted), paths)
    if report:
        raise BadFile(f"{config.where}: target_modules and the file's modules differ: {report}")


def _size(config: Config, path: str, default: int) -> tuple[int, float]:
    ranks, alphas = config.patterns("rank_pattern"), config.patterns("alpha_pattern")
    rank = by_pattern(ranks, path, config.number("r", default), config.where)
    return int(rank), by_pattern(alphas, path, config.number("alpha", default), config.where)


def of_kind(stored: StoredAdapter, kind: type[T]) -> dict[str, tuple[T, Place, dict[str, Tensor]]]:
    """Module path -> technique of this kind, its place and tensors. HF PEFT has one of them per whole module."""
    found: dict[str, tuple[T, Place, dict[str, Tensor]]] = {}
    for index, technique in enumerate(stored.manifest.techniques):
        if isinstance(technique, kind):
            for key, own in stored.of(index).items():
                place = stored.manifest.sites[key]
                if place.channels is not None or place.parameter != "weight":
                    raise BadFile(
                        f"{key}: HF PEFT's {kind.__name__} changes whole weights of modules, not experts or a part "
                        "of a fused projection"
                    )
                if place.module in found:
                    raise BadFile(
                        f"{place.module}: HF PEFT holds one {kind.__name__} per module, here are two"
                    )
                found[place.module] = technique, place, own
    return found


def common(
    stored: StoredAdapter, peft_type: str, paths: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration fields of every type, and the tensors of modules that are saved whole."""
    saved = written_modules(stored)
    task, modules = task_and_modules(stored, saved)
    config = {
        "peft_type": peft_type,
        "task_type": task,
        "target_modules": sorted(paths),
        "modules_to_save": modules,
        "inference_mode": True,
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


def only(values: Iterable[Any], what: str) -> Any:
    """The one value that all agree in. Raises BadFile."""
    found = list(dict.fromkeys(values))
    if len(found) > 1:
        raise BadFile(f"HF PEFT has one {what} for all of an adapter, this one has {found}")
    return found[0]


def transposed(places: Iterable[Place]) -> bool:
    """`fan_in_fan_out`: all modules store their weight as (in, out)."""
    return all(is_transposed(place) for place in places)
