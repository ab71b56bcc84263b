"""Every place of one model: the anatomy's paths followed through the modules, and what was found measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from graftwork.anatomy.anatomy import Anatomy, Layout, Part, Place, Stack, places_of
from graftwork.anatomy.measure import Measure, measure, measure_parameter, measure_tensor, tensor
from graftwork.anatomy.walk import expand, join

_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads")


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One workspace at one module; `measure` is None where the place names a block without a weight."""

    workspace: str
    path: str
    module: nn.Module
    place: Place
    measure: Measure | None
    channels: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer with the spots inside it."""

    number: int
    path: str
    module: nn.Module
    spots: tuple[Spot, ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One stack as it is in this model."""

    stack: Stack
    around: tuple[Spot, ...]
    layers: tuple[Layer, ...]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """All stacks and places of one model, in the order of its anatomy."""

    runs: tuple[Run, ...]
    places: tuple[Spot, ...]

    def spots(self) -> Iterator[Spot]:
        """Every spot once."""
        for run in self.runs:
            yield from run.around
            for layer in run.layers:
                yield from layer.spots
        yield from self.places


def survey(model: nn.Module, anatomy: Anatomy) -> Survey:
    """Follow an anatomy whose paths start at the model's root."""
    runs = [_run(model, stack) for stack in anatomy.stacks]
    return Survey(
        runs=tuple(run for run in runs if run.layers or run.around),
        places=_spots(model, "", anatomy.places, None),
    )


def key_heads(module: nn.Module) -> int:
    """Number of key and value heads of an attention module, by its own or its config's word; 0 unknown."""
    return _number(module, _KEY_HEADS) or query_heads(module)


def query_heads(module: nn.Module) -> int:
    """Number of query heads of an attention module; 0 unknown."""
    return _number(module, _HEADS)


def _run(model: nn.Module, stack: Stack) -> Run:
    found = [hit for pattern in stack.layers for hit in expand(model, pattern)]
    unique = list({id(module): (path, module) for path, module in reversed(found)}.values())[::-1]
    layers = (
        Layer(number=n, path=path, module=module, spots=_spots(module, path, stack.places, stack.attention))
        for n, (path, module) in enumerate(unique)
    )
    return Run(stack=stack, around=_spots(model, "", stack.around, None), layers=tuple(layers))


def _spots(root: nn.Module, path: str, places: object, attention: str | None) -> tuple[Spot, ...]:
    """Wholes first, since the parts of a fused projection are cut by the widths around it."""
    entries = places_of(places)  # type: ignore[arg-type]
    wholes = [
        s for workspace, place in entries if place.part is None for s in _whole(root, path, workspace, place)
    ]
    parts = [
        s
        for workspace, place in entries
        if place.part
        for s in _part(root, path, workspace, place, wholes, attention)
    ]
    order = {workspace: n for n, (workspace, _) in enumerate(entries)}
    return tuple(sorted(_once([*wholes, *parts]), key=lambda spot: order[spot.workspace]))


def _whole(root: nn.Module, path: str, workspace: str, place: Place) -> Iterator[Spot]:
    for inner, module in expand(root, place.path):
        found = _measured(module, place)
        if found is None and (place.parameter or "." in workspace or _weightless(module)):
            continue
        yield Spot(workspace=workspace, path=join(path, inner), module=module, place=place, measure=found)


def _measured(module: nn.Module, place: Place) -> Measure | None:
    if place.parameter is None:
        return measure(module)
    if not place.bare:
        return measure_parameter(module, place.parameter)
    stored = module._parameters.get(place.parameter)
    return None if stored is None else measure_tensor(stored)


def _part(
    root: nn.Module, path: str, workspace: str, place: Place, wholes: list[Spot], attention: str | None
) -> Iterator[Spot]:
    assert place.part is not None
    output = next((s.measure for s in wholes if s.workspace == f"{workspace.partition('.')[0]}.output"), None)
    for inner, module in expand(root, place.path):
        found = _measured(module, place)
        if found is None:
            continue
        heads = (
            0 if attention is None else max((query_heads(m) for _, m in expand(root, attention)), default=0)
        )
        own = _channels(place.part, found.width_out, output.width_in if output else 0, heads)
        if own is not None:
            yield Spot(
                workspace=workspace,
                path=join(path, inner),
                module=module,
                place=place,
                measure=found,
                channels=own,
            )


def _channels(part: Part, total: int, query: int, heads: int) -> tuple[int, ...] | None:
    if part.layout is Layout.HEADS:
        return (heads, part.count, part.index, total // (heads * part.count)) if heads else None
    if part.layout is Layout.EQUAL:
        width = total // part.count
        return part.index * width, (part.index + 1) * width
    key = (total - query) // 2
    starts = (0, query, query + key, total)
    return (starts[part.index], starts[part.index + 1]) if query else None


def _once(spots: list[Spot]) -> list[Spot]:
    unique = {(id(s.module), s.place.parameter, s.channels, s.workspace): s for s in reversed(spots)}
    return list(unique.values())[::-1]


def _weightless(module: nn.Module) -> bool:
    return next(module.parameters(), None) is None and tensor(module, "weight") is None


def _number(module: nn.Module, names: tuple[str, ...]) -> int:
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return 0
