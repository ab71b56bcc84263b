"""What an adapter is made of, part by part: to be read before training, and to see what a file will weigh."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftwork.engine.adapter import stored_tensors

if TYPE_CHECKING:
    from graftwork.engine.adapter import Adapter, Placed

Key = tuple[str, str]  # technique, workspace


@dataclass(frozen=True)
class Part:
    """One technique at one workspace.

    Attributes:
        technique: its name.
        workspace: with the stack in front where there are several; `shared` for what sites have in common.
        modules: how many modules it inserts there (0 for `shared`).
        layers: the layers they are in; layers_there: how many the stack has (0 outside layers).
        parameters: trainable values. bytes: of the tensors in an adapter file.
    """

    technique: str
    workspace: str
    modules: int
    layers: tuple[int, ...]
    layers_there: int
    parameters: int
    bytes: int


def parts(adapter: Adapter) -> list[Part]:
    """The parts of an adapter in the order of its sites; every tensor is counted in one part."""
    places: dict[Key, list[Placed]] = {}
    for place in adapter.placed:
        places.setdefault(_key(place, ""), []).append(place)
    values, sizes = _values(adapter), _sizes(adapter)
    return [
        _part(key, places.get(key, []), values[key], sizes[key])
        for key in [*places, *(values.keys() - places)]
    ]


def table(adapter: Adapter) -> str:
    """The parts as lines of text, with the sum and its share of the host last."""
    rows = parts(adapter)
    cells = [(r.technique, r.workspace, *_reach(r), f"{r.parameters:,}", f"{r.bytes:,} B") for r in rows]
    head = ("technique", "workspace", "modules", "layers", "parameters", "in a file")
    count = adapter.count()
    share = f", {count / adapter.host_parameters:.3%} of the host's" if adapter.host_parameters else ""
    size = sum(row.bytes for row in rows)
    last = f"{adapter.name}: {len(adapter.placed)} modules, {count:,} parameters{share}, {size:,} B"
    return "\n".join([*_aligned([head, *cells]), last])


def _key(place: Placed, tensor: str) -> Key:
    where = ".".join(filter(None, (place.site.stack, place.site.workspace)))
    return place.graft.technique, "shared" if tensor.startswith("shared.") else where


def _values(adapter: Adapter) -> Counter[Key]:
    """Trainable values by part."""
    found: Counter[Key] = Counter()
    seen: set[int] = set()
    for place in adapter.placed:
        for name, parameter in place.graft.module.named_parameters():
            found[_key(place, name)] += 0 if id(parameter) in seen else parameter.numel()
            seen.add(id(parameter))
    return found


def _sizes(adapter: Adapter) -> Counter[Key]:
    """Bytes in an adapter file by part."""
    found: Counter[Key] = Counter()
    seen: set[str] = set()
    for place in adapter.placed:
        for name, tensor in stored_tensors(place.graft.module).items():
            full = adapter.tensor_name(place, name)
            found[_key(place, name)] += 0 if full in seen else tensor.nbytes
            seen.add(full)
    return found


def _part(key: Key, places: list[Placed], values: int, size: int) -> Part:
    layers = tuple(sorted({place.site.layer for place in places if place.site.layer is not None}))
    there = places[0].site.layers if layers else 0
    return Part(*key, len(places), layers, there, values, size)


def _reach(part: Part) -> tuple[str, str]:
    if not part.layers:
        return (str(part.modules) if part.modules else ""), ""
    return str(part.modules), f"{_ranges(part.layers)} of {part.layers_there}"


def _ranges(numbers: tuple[int, ...]) -> str:
    """`(0, 1, 2, 5)` -> `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
