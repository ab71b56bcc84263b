"""What HF PEFT files hold beside a method's own tensors: whole modules (heads) and biases.

Whole modules are fine-tuning here, biases are BitFit. A bias is stored in full there and as a difference
here, so the base's own is needed to translate it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from graftwork.adapters.format import both_directions
from graftwork.adapters.hf_peft.config import HEADS, TASKS, Config
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.manifest import Place
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import BadFile
from graftwork.reference.properties import Port
from graftwork.reference.site import Kind, Site
from graftwork.techniques.bitfit import BitFit
from graftwork.techniques.fine_tuning import FineTuning

BIAS = "base_layer.bias"
_TWINS = (".original_module.bias", ".modules_to_save.bias")  # bias="all" writes the heads' biases twice more
WHOLE = frozenset({"fine-tuning", "norm-tuning"})
"""Techniques whose tensors are whole modules."""


def read_saved(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Take the modules that the configuration saves whole out of `tensors`."""
    roots = [path for path in host.paths if path.endswith(config.saved_modules() or ("\0",))]
    expected = dict.fromkeys(name for root in roots for name in host.parameters(root))
    found = {name: tensors.pop(name) for name in list(tensors) if name in expected}
    report = both_directions(expected, found)
    if report:
        raise BadFile(f"{config.where}: modules that are saved whole are incomplete: {report}")
    return whole_parts(found, host, config.where)


def whole_parts(found: Mapping[str, Tensor], host: Host, where: str) -> list[Part]:
    """Fine-tuning of the modules whose parameters are given by full name."""
    by_path: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        path, _, parameter = name.rpartition(".")
        by_path.setdefault(path, {})[parameter] = tensor
    sites = {path: host.site(path, where) for path in by_path}
    covered = host.cover(list(sites.values()), Port.WEIGHT, lambda w, n: FineTuning(workspaces=w, layers=n))
    return [Part(technique, group, _copies(group, by_path, host, where)) for technique, group in covered]


def _copies(
    group: Iterable[Site], by_path: Mapping[str, Mapping[str, Tensor]], host: Host, where: str
) -> dict[tuple[str, str], Tensor]:
    out: dict[tuple[str, str], Tensor] = {}
    for site in group:
        for parameter, tensor in by_path[site.module].items():
            if parameter not in ("weight", "bias"):
                raise BadFile(f"{where}: {site.module}.{parameter} is no weight or bias")
            whole = host.matrix(site.module, tensor, where) if parameter == "weight" else tensor
            table = site.kind is Kind.EMBEDDING  # kept as rows
            out[site.key, parameter] = tensor if table else whole
    return out


def read_biases(kind: str, tensors: dict[str, Tensor], host: Host, where: str) -> list[Part]:
    """Take the biases that `bias="all"` or `"lora_only"` added out of `tensors`."""
    if kind == "none":
        return []
    for name in [name for name in tensors if name.endswith(_TWINS)]:
        del tensors[name]
    names = [name for name in tensors if name.endswith(".bias")]
    full = {name.removesuffix(".bias").removesuffix(".base_layer"): tensors.pop(name) for name in names}
    sites = [host.site(path, where) for path in _once(full, host, where)]
    parts = []
    for technique, group in host.cover(sites, Port.WEIGHT, lambda w, n: BitFit(workspaces=w, layers=n)):
        deltas = {}
        for site in group:
            base = host.stored(site.module, "bias", where).float().cpu()
            deltas[site.key, "delta"] = full[site.module].float() - base
        parts.append(Part(technique, group, deltas))
    return parts


def _once(full: Mapping[str, Tensor], host: Host, where: str) -> list[str]:
    """The paths without second names of one bias (a head that shows its decoder's bias as its own)."""
    first: dict[int, str] = {}
    for path in sorted(full, key=lambda path: -path.count(".")):
        known = first.setdefault(id(host.parameter(path, "bias", where)), path)
        if not torch.equal(full[known], full[path]):
            raise BadFile(f"{where}: {known} and {path} share one bias here but not in the file")
    return [path for path in full if path in first.values()]


def written_modules(stored: StoredAdapter) -> dict[str, Tensor]:
    """Full name -> tensor in storage layout, of every module that is saved whole."""
    out: dict[str, Tensor] = {}
    for index, technique in enumerate(stored.manifest.techniques):
        if technique.name in WHOLE:
            for key, tensors in stored.of(index).items():
                out.update(native(stored.manifest.sites[key], tensors))
    return out


def native(place: Place, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight and bias of one module under their full names, in the module's storage layout."""
    if place.channels is not None or place.parameter != "weight":
        raise BadFile(f"{place.module}: HF PEFT saves whole modules, not {place.parameter} or a part of it")
    out = {f"{place.module}.{name}": tensor for name, tensor in tensors.items()}
    weight = f"{place.module}.weight"
    if weight in out:
        out[weight] = _layout(place, out[weight]).contiguous()
    return out


def _layout(place: Place, matrix: Tensor) -> Tensor:
    if place.kernel:
        return matrix.reshape(len(matrix), -1, *place.kernel)
    return matrix.mT if is_transposed(place) else matrix


def is_transposed(place: Place) -> bool:
    """Whether the module stores its weight as (in, out)."""
    return place.host == "Conv1D"


def task_and_modules(stored: StoredAdapter, saved: Iterable[str]) -> tuple[str | None, list[str] | None]:
    """(task type, `modules_to_save`) with which HF PEFT saves exactly the modules of `saved`.

    A task type with a head is left out when the adapter has no head: the reader would ask for one.
    """
    task = TASKS.get(stored.manifest.task)
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in saved))
    implied = HEADS.get(task or "", ())
    rest = [path for path in paths if not _implied(path, implied)]
    if implied and len(rest) == len(paths):
        task = None
    return task, (rest + list(implied if task in HEADS else ())) or None


def _implied(path: str, names: tuple[str, ...]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[: i + 1]).endswith(names) for i in range(len(parts))) if names else False
