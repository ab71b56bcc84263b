"""From places to sites, port by port."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from graftwork.anatomy.measure import Measure
from graftwork.anatomy.survey import Layer, Run, Spot, Survey, key_heads
from graftwork.anatomy.walk import expand, join
from graftwork.reference.properties import Port
from graftwork.reference.site import Kind, Side, Site

BLOCKS = {
    "attention": (("attention.query", "attention.qkv"), "attention.output"),
    "cross_attention": (("cross_attention.query", "cross_attention.qkv"), "cross_attention.output"),
    "feedforward": (("feedforward.gate", "feedforward.up", "feedforward.gate_up"), "feedforward.down"),
}
BARE = (Kind.PARAMETER, Kind.TENSOR)
_LAYER_ENDS = ("attention.output", "feedforward.down", "ssm.out", "conv", "linear", "norm")
_LAYER_STARTS = ("attention.query", "attention.qkv", "feedforward.up", "ssm.in", "conv", "linear", "norm")


@dataclass(frozen=True)
class _Where:
    stack: str = ""
    layer: int | None = None
    layers: int = 0
    causal: bool = False


def sites_at(found: Survey, port: Port) -> list[Site]:
    """Every site of the model at a port, with unique keys."""
    make = {Port.WEIGHT: _weight, Port.HIDDEN: _hidden, Port.ATTENTION: _attention, Port.SEQUENCE: _sequence}[
        port
    ]
    sites = [site for run in found.runs for site in make(run)]
    if port in (Port.WEIGHT, Port.HIDDEN):
        sites += [_site(s, _Where()) for s in found.places if s.measure and _at(s, port)]
    return _keyed(sites)


def block_sites(found: Survey) -> list[Site]:
    """Blocks, layers and inner activations: the sites of the hidden port that have no weight of their own."""
    layers = [s for run in found.runs for layer in run.layers for s in _blocks(run, layer)]
    return _keyed([*(s for run in found.runs for s in _inputs(run)), *layers])


def _weight(run: Run) -> Iterator[Site]:
    yield from _plain(run, Port.WEIGHT)


def _hidden(run: Run) -> Iterator[Site]:
    yield from _plain(run, Port.HIDDEN)
    yield from _inputs(run)
    for layer in run.layers:
        yield from _blocks(run, layer)


def _plain(run: Run, port: Port) -> Iterator[Site]:
    outside = _Where(run.stack.name, None, len(run.layers), run.stack.causal)
    yield from (_site(s, outside) for s in run.around if s.measure and _at(s, port))
    for layer in run.layers:
        where = replace(outside, layer=layer.number)
        yield from (_site(s, where) for s in layer.spots if s.measure and _at(s, port))


def _at(spot: Spot, port: Port) -> bool:
    """A bare parameter is read inside its owner's forward and has no activations of its own."""
    return port is Port.WEIGHT or (spot.measure is not None and spot.measure.kind not in BARE)


def _site(spot: Spot, where: _Where) -> Site:
    m = spot.measure
    assert m is not None
    own = spot.channels
    width = m.width_out if own is None else own[1] - own[0] if len(own) == 2 else own[0] * own[3]
    return Site(
        key="", workspace=spot.workspace, kind=m.kind, module=spot.path,
        stack=where.stack, layer=where.layer, layers=where.layers, causal=where.causal,
        parameter=spot.place.parameter or "weight", access=spot.place.access,
        channels=own, fused_width=0 if own is None else m.width_out, channel_axis=m.channel_axis,
        width_in=m.width_in, width_out=width, channels_in=m.channels_in, channels_out=width,
        kernel=m.kernel, batch=m.batch, has_bias=m.has_bias, dtype=m.dtype, device=m.device,
    )  # fmt: skip


def _blocks(run: Run, layer: Layer) -> Iterator[Site]:
    where = _Where(run.stack.name, layer.number, len(run.layers), run.stack.causal)
    for workspace, (starts, end) in BLOCKS.items():
        named = [spot for spot in layer.spots if spot.workspace == workspace]
        if named:
            yield from (_module_block(run, layer, spot, where) for spot in named)
        else:
            yield from _span(layer, workspace, starts, end, where)
    for spot in layer.spots:
        if spot.workspace == "feedforward.down" and spot.measure:
            yield replace(_site(spot, where), workspace="feedforward.activation", side=Side.INPUT)
    if layer.spots:
        spot = Spot(
            workspace="layer", path=layer.path, module=layer.module, place=layer.spots[0].place, measure=None
        )
        yield replace(_module_block(run, layer, spot, where), channel_axis=run.stack.channel_axis)


def _inputs(run: Run) -> Iterator[Site]:
    """What the first layer reads, wherever it was embedded."""
    for site in _blocks(run, run.layers[0]) if run.layers else ():
        if site.workspace == "layer" and site.channels_in:
            yield replace(site, workspace="inputs", layer=None, side=Side.INPUT)


def _span(layer: Layer, workspace: str, starts: tuple[str, ...], end: str, where: _Where) -> Iterator[Site]:
    """A block from its first projection to its last: what the first reads, behind the last."""
    firsts = [s for s in layer.spots if s.workspace in starts and s.measure and s.channels is None]
    lasts = [s for s in layer.spots if s.workspace == end and s.measure]
    firsts = [s for s in firsts if s.workspace == firsts[0].workspace]
    for n, last in enumerate(lasts):
        first = firsts[n] if len(firsts) == len(lasts) else None
        site = replace(_site(last, where), workspace=workspace)
        if first is not None and first.measure is not None:
            site = replace(site, entry=first.path, channels_in=first.measure.channels_in)
        yield site


def _module_block(run: Run, layer: Layer, spot: Spot, where: _Where) -> Site:
    """A block that is one module: widths of the layer's residual stream."""
    start, end = _first(layer.spots, _LAYER_STARTS), _last(layer.spots, _LAYER_ENDS)
    storage = end or start
    return Site(
        key="", workspace=spot.workspace, kind=Kind.BLOCK, module=spot.path,
        stack=where.stack, layer=where.layer, layers=where.layers, causal=where.causal,
        width_in=start.channels_in if start else 0, width_out=end.channels_out if end else 0,
        channels_in=start.channels_in if start else 0, channels_out=end.channels_out if end else 0,
        dtype=storage.dtype if storage else torch.float32,
        device=storage.device if storage else torch.device("cpu"),
    )  # fmt: skip


def _first(spots: Iterable[Spot], workspaces: tuple[str, ...]) -> Measure | None:
    return _pick(list(spots), workspaces)


def _last(spots: Iterable[Spot], workspaces: tuple[str, ...]) -> Measure | None:
    return _pick(list(spots)[::-1], workspaces)


def _pick(spots: list[Spot], workspaces: tuple[str, ...]) -> Measure | None:
    for workspace in workspaces:
        for spot in spots:
            if spot.workspace == workspace and spot.measure is not None and spot.channels is None:
                return spot.measure
    return None


def _attention(run: Run) -> Iterator[Site]:
    for layer in run.layers:
        for workspace, pattern in (
            ("attention", run.stack.attention),
            ("cross_attention", run.stack.cross_attention),
        ):
            for path, module in expand(layer.module, pattern) if pattern is not None else ():
                yield _attention_site(run, layer, workspace, join(layer.path, path), module)


def _attention_site(run: Run, layer: Layer, workspace: str, path: str, module: nn.Module) -> Site:
    where = _Where(
        run.stack.name, layer.number, len(run.layers), run.stack.causal and workspace == "attention"
    )
    inside = {s.workspace: _site(s, where) for s in layer.spots if s.measure}
    key, value = inside.get(f"{workspace}.key"), inside.get(f"{workspace}.value")
    stored = key or next(iter(inside.values()))
    first = inside.get(f"{workspace}.query") or inside.get(f"{workspace}.qkv") or stored
    return Site(
        key="", workspace=workspace, kind=Kind.ATTENTION, module=path,
        stack=where.stack, layer=where.layer, layers=where.layers, causal=where.causal,
        key_width=key.width_out if key else 0, value_width=value.width_out if value else 0,
        channels_in=first.channels_in, heads=key_heads(module), dtype=stored.dtype, device=stored.device,
    )  # fmt: skip


def _sequence(run: Run) -> Iterator[Site]:
    if not run.layers or run.stack.sequence is None:
        return
    layers = [site for layer in run.layers for site in _blocks(run, layer) if site.workspace == "layer"]
    whole = run.stack.sequence == "stack"
    tables = [s.measure for s in run.around if s.workspace == "embedding" and s.measure]
    width = tables[0].channels_out if whole and tables else layers[0].channels_in
    patch = tables[0].width_in if tables and tables[0].kernel else 0
    yield replace(
        layers[0], workspace="embedding", kind=Kind.STACK, module=run.stack.path, layer=None,
        entry=None if whole else run.layers[0].path,
        width_in=width, width_out=width, channels_in=width, channels_out=width, patch=patch,
    )  # fmt: skip
    yield from (replace(layer, patch=patch) for layer in layers)


def _keyed(sites: list[Site]) -> list[Site]:
    seen: Counter[str] = Counter()
    keyed = []
    for site in sites:
        number = "" if site.layer is None else str(site.layer)
        place = f"{number}/{site.workspace}" if number else site.workspace
        key = join(site.stack, place)
        keyed.append(replace(site, key=f"{key}#{seen[key]}" if seen[key] else key))
        seen[key] += 1
    return keyed
