"""HF PEFT's IA3: one vector per module, (out, 1) on its output or (1, in) on its input
(`feedforward_modules`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.extras import is_transposed, read_saved
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.keys import pop_leaf
from graftwork.adapters.hf_peft.layerwise import compare_targets, document
from graftwork.adapters.hf_peft.matching import safe_pattern
from graftwork.adapters.manifest import Place
from graftwork.adapters.stored import StoredAdapter
from graftwork.engine.channels import put, take
from graftwork.errors import BadFile
from graftwork.reference.properties import Port
from graftwork.reference.site import Side, Site
from graftwork.techniques.ia3 import IA3

UNDERSTOOD = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")
INDIFFERENT = ("fan_in_fan_out", "init_ia3_weights")
LEAF = "ia3_l"


def read(config: Config, tensors: dict[str, Tensor], host: Host) -> list[Part]:
    """Techniques and their tensors; takes what it understands out of `tensors`."""
    config.check(UNDERSTOOD, INDIFFERENT)
    saved = read_saved(config, tensors, host)
    vectors = pop_leaf(tensors, LEAF)
    compare_targets(config, host, vectors)
    borrowed = {path: site for path in vectors if (site := _values_before(config, host, path)) is not None}
    direct = {
        path: host.site(path, config.where, _side(config, path), Port.HIDDEN)
        for path in vectors
        if path not in borrowed
    }
    parts = [_parts(host, sites, vectors, config) for sites in (direct, borrowed)]
    return [*parts[0], *parts[1], *saved]


def _parts(
    host: Host, sites: Mapping[str, Site], vectors: Mapping[str, Tensor], config: Config
) -> list[Part]:
    scales = {_place(site): _fitting(site, path, vectors[path], config) for path, site in sites.items()}
    covered = host.cover(list(sites.values()), Port.HIDDEN, lambda w, n: IA3(workspaces=w, layers=n))
    return [Part(t, group, {(s.key, "scale"): scales[_place(s)] for s in group}) for t, group in covered]


def _place(site: Site) -> tuple[str, Side, tuple[int, ...] | None]:
    return site.module, site.side, site.channels


def _values_before(config: Config, host: Host, path: str) -> Site | None:
    """The values that an attention's output projection reads, when its input is to be rescaled.

    Attention mixes positions within each channel, so rescaling its answer is rescaling the values, where each
    value head serves one query head.
    """
    if _side(config, path) is Side.OUTPUT:
        return None
    mixed = [
        s for s in host.sites if s.module == path and s.weighted and s.workspace.endswith("attention.output")
    ]
    values = [
        site
        for output in mixed
        for site in host.sites
        if (site.stack, site.layer, site.weighted) == (output.stack, output.layer, True)
        and site.workspace == output.workspace.replace("output", "value")
        and site.width_out == output.width_in
    ]
    return values[0] if len(values) == 1 else None


def _side(config: Config, path: str) -> Side:
    wanted = config.document.get("feedforward_modules")
    if isinstance(wanted, str):
        return Side.INPUT if safe_pattern(wanted, config.where).fullmatch(path) else Side.OUTPUT
    return Side.INPUT if path.endswith(config.names("feedforward_modules") or ("\0",)) else Side.OUTPUT


def _fitting(site: Site, path: str, vector: Tensor, config: Config) -> Tensor:
    if vector.numel() != site.width:
        raise BadFile(
            f"{config.where}: {path}.{LEAF} has shape {tuple(vector.shape)}, but {site.width} channels are "
            f"rescaled there"
        )
    return vector.reshape(-1)


def write(stored: StoredAdapter, host: Host | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors by path and leaf)."""
    found: dict[str, tuple[Place, Tensor]] = {}
    for index, technique in enumerate(stored.manifest.techniques):
        if isinstance(technique, IA3):
            for key, own in stored.of(index).items():
                place = stored.manifest.sites[key]
                found[place.module] = place, _joined(key, place, own["scale"], found.get(place.module))
    fields = {
        "feedforward_modules": sorted(p for p, (place, _) in found.items() if place.side == Side.INPUT),
        "fan_in_fan_out": all(is_transposed(place) for place, _ in found.values()),
    }
    config, saved = document("IA3", stored, found, fields)
    return config, {f"{path}.{LEAF}": _shaped(place, v) for path, (place, v) in found.items()} | saved


def _joined(key: str, place: Place, scale: Tensor, before: tuple[Place, Tensor] | None) -> Tensor:
    """The vector of the whole module, of which `scale` may be a part (of a fused projection)."""
    if place.kind == "block" or place.parameter != "weight":
        raise BadFile(f"{key}: HF PEFT rescales the output or input of a linear layer or convolution only")
    if before is not None and before[0].side != place.side:
        raise BadFile(f"{place.module}: HF PEFT rescales a module's input or its output, this adapter both")
    whole = before[1] if before is not None else scale.new_ones(place.fused_width or len(scale))
    if place.channels is None:
        return whole * scale
    return put(whole, take(whole, place.channels, -1) * scale, place.channels, -1)


def _shaped(place: Place, vector: Tensor) -> Tensor:
    if place.kernel:
        return vector.reshape(1, -1, *(1 for _ in place.kernel))
    return vector.reshape(1, -1) if place.side == Side.INPUT else vector.reshape(-1, 1)
