"""HF PEFT's LN_TUNING: full copies of chosen modules, `ln_tuning_layers.weight` and `.bias`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graftwork.adapters.format import both_directions
from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.extras import native, read_saved, task_and_modules, whole_parts
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.matching import targeted
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import BadFile
from graftwork.reference.properties import Port
from graftwork.reference.site import Kind
from graftwork.techniques.norm_tuning import NormTuning

UNDERSTOOD = ("target_modules", "exclude_modules", "modules_to_save")
INFIX = "ln_tuning_layers."


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD)
    saved = read_saved(config, tensors, host)
    names = [name for name in tensors if f".{INFIX}" in name]
    found = {name.replace(f".{INFIX}", "."): tensors.pop(name) for name in names}
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in found))
    _complete(config, host, paths, found)
    sites = {path: host.site(path, config.where) for path in paths}
    norms = [site for site in sites.values() if site.kind is Kind.NORM]
    others = {name: t for name, t in found.items() if sites[name.rpartition(".")[0]].kind is not Kind.NORM}
    parts = []
    for technique, group in host.cover(norms, Port.WEIGHT, lambda w, n: NormTuning(workspaces=w, layers=n)):
        own = {
            (site.key, parameter): found[f"{site.module}.{parameter}"]
            for site in group
            for parameter in ("weight", "bias")
            if f"{site.module}.{parameter}" in found
        }
        parts.append(Part(technique, group, own))
    return [*parts, *whole_parts(others, host, config.where), *saved]


def _complete(config: Config, host: Host, paths: list[str], found: dict[str, Tensor]) -> None:
    for path in paths:
        host.module(path, config.where)
    wanted = targeted(config, host.paths)
    modules = paths if wanted is None else wanted
    expected = dict.fromkeys(name for path in modules for name in host.parameters(path))
    report = both_directions(expected, found)
    if report:
        raise BadFile(f"{config.where}: target_modules and the file's tensors differ: {report}")


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    tensors: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    paths: list[str] = []
    for index, technique in enumerate(stored.manifest.techniques):
        for key, own in stored.of(index).items():
            place = stored.manifest.sites[key]
            whole = native(place, own)
            if isinstance(technique, NormTuning):
                paths.append(place.module)
                tensors |= {_infixed(name): tensor for name, tensor in whole.items()}
            else:
                saved |= whole
    task, modules = task_and_modules(stored, saved)
    config = {
        "peft_type": "LN_TUNING",
        "task_type": task,
        "target_modules": sorted(paths),
        "modules_to_save": modules,
        "inference_mode": True,
    }
    return config, tensors | saved


def _infixed(name: str) -> str:
    path, _, parameter = name.rpartition(".")
    return f"{path}.{INFIX}{parameter}"
