"""`add`, `negate`, `scale`, `combine` and `compose`: a new adapter out of trained ones, which stay as they are.

The first argument says where: a model, whose attached adapters are meant by their names and get the result as one more;
or a folder, where a file of the result is written while the operands are files or folders anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from graftwork.adapters.format import read_own, write_own
from graftwork.adapters.installing import install, snapshot
from graftwork.adapters.names import check_file_name
from graftwork.adapters.store import SUFFIX, is_hf_peft, locate
from graftwork.adapters.stored import StoredAdapter, assemble
from graftwork.composition.expression import parse
from graftwork.composition.heads import MERGE, head_of_sum
from graftwork.composition.methods import Method
from graftwork.composition.operands import Operand, Term, check_bases, join
from graftwork.composition.parameters import Parameters
from graftwork.composition.updates import Energy
from graftwork.engine.adapter import Adapter
from graftwork.errors import BadFile, BadOption, UnknownName, nearest

Source = str | Path
PARAMETERS = Parameters()


@dataclass(frozen=True)
class Composed:
    """A new adapter.

    Attributes:
        energies: site key -> squared norm kept and whole, where a method cut the rank; else empty.
        adapter: what was attached, where a model was given.
        path: the file, where a folder was given.
    """

    energies: Mapping[str, Energy]
    adapter: Adapter | None = None
    path: Path | None = None

    @property
    def retained(self) -> float:
        """Share of the squared norm of all updates that was kept; 1 where nothing was cut."""
        kept, whole = (math.fsum(values) for values in zip((0.0, 0.0), *self.energies.values(), strict=True))
        return Energy(kept, whole).share


def add(
    where: nn.Module | Source,
    *operands: Source,
    name: str,
    method: Method = PARAMETERS,
    head: str = MERGE,
) -> Composed:
    """The sum of adapters: each with weight 1. See `combine`."""
    return _compose(where, [(1.0, operand) for operand in operands], name, method, head)


def negate(
    where: nn.Module | Source,
    operand: Source,
    *,
    name: str,
    strength: float = 1.0,
    method: Method = PARAMETERS,
    head: str = MERGE,
) -> Composed:
    """An adapter that changes the model the other way, `strength` times as much: weight -strength. See `combine`."""
    return _compose(where, [(-strength, operand)], name, method, head)


def scale(
    where: nn.Module | Source,
    operand: Source,
    weight: float,
    *,
    name: str,
    method: Method = PARAMETERS,
    head: str = MERGE,
) -> Composed:
    """An adapter that changes the model `weight` times as much. See `combine`."""
    return _compose(where, [(weight, operand)], name, method, head)


def combine(
    where: nn.Module | Source,
    weights: Mapping[str, float],
    *,
    name: str,
    method: Method = PARAMETERS,
    head: str = MERGE,
) -> Composed:
    """The weighted sum of adapters, as a new adapter; the operands stay as they are, bit for bit.

    Args:
        where: a model: operands are the names of its adapters, and the result is attached to it, active and frozen.
            A folder: operands are files or folders as `load` takes them, or names of files in it, and the result is
            written to `FOLDER/NAME.safetensors`.
        weights: operand -> weight, negative to subtract.
        name: of the new adapter.
        method: tensor by tensor (`Parameters`), or on the updates of the weights (`Concatenation`, `Linear`, `TIES`,
            `DARE`, `MagnitudePruning`).
        head: task heads: "merge": their mean, where all share their labels; "none"; or the operand whose head stays.

    Raises:
        NotComposable: the sum is not defined, or the adapters differ; the text says in what. WrongBase: they were
        made for different bases. UnknownName: an operand that does not exist.
    """
    return _compose(where, [(weight, operand) for operand, weight in weights.items()], name, method, head)


def compose(
    where: nn.Module | Source,
    expression: str,
    *,
    name: str,
    method: Method = PARAMETERS,
    head: str = MERGE,
    operands: Mapping[str, Source] | None = None,
) -> Composed:
    """What an expression over adapters says, `a + 0.5*b - toxic`. See `combine`.

    Args:
        operands: in a folder: names in the expression -> files or folders.
    """
    return _compose(where, parse(expression), name, method, head, operands or {})


def _compose(
    where: nn.Module | Source,
    terms: Sequence[tuple[float, Source]],
    name: str,
    method: Method,
    head: str,
    operands: Mapping[str, Source] | None = None,
) -> Composed:
    if isinstance(where, nn.Module):
        sum_, energies = composed([Term(w, _attached(where, str(o))) for w, o in terms], name, method, head)
        return Composed(energies, adapter=install(where, sum_, name))
    target = Path(where) / f"{check_file_name(name)}{SUFFIX}"
    found = {operand: _path(Path(where), operand, operands or {}) for _, operand in terms}
    for operand, path in found.items():
        if path.resolve() == target.resolve():
            raise BadOption(f"{target} is the operand {str(operand)!r} itself; choose another name")
    read = {operand: Operand(str(operand), _read(path)) for operand, path in found.items()}
    sum_, energies = composed([Term(w, read[o]) for w, o in terms], name, method, head)
    write_own(target, sum_)
    return Composed(energies, path=target)


def composed(
    terms: Sequence[Term], name: str, method: Method = PARAMETERS, head: str = MERGE
) -> tuple[StoredAdapter, Mapping[str, Energy]]:
    """The sum as a file holds it, and the energies of cut ranks."""
    if not terms:
        raise BadOption("a sum needs at least one adapter")
    for term in terms:
        if not math.isfinite(term.weight):
            raise BadOption(f"the weight of {term.operand.label!r} is {term.weight}, not a finite number")
    check_bases(terms)
    body, energies = method.merged(terms)
    top, labels = head_of_sum(terms, head)
    whole = join(body, top)
    first = next((t.operand.manifest for t in terms if t.operand.head().tensors), terms[0].operand.manifest)
    keys = {owner.key for owner in whole.tensors}
    sites = {key: place for t in terms for key, place in t.operand.manifest.sites.items() if key in keys}
    return assemble(name, whole.techniques, whole.tensors, sites, first.base, first.task, labels), energies


def _attached(model: nn.Module, name: str) -> Operand:
    return Operand(name, snapshot(model, name), model)


def _path(folder: Path, operand: Source, operands: Mapping[str, Source]) -> Path:
    if operand in operands:
        return locate(Path(operands[str(operand)]))
    inside = folder / f"{operand}{SUFFIX}"
    if inside.is_file():
        return inside
    if Path(operand).exists():
        return locate(Path(operand))
    known = {*operands, *(entry.stem for entry in folder.glob(f"*{SUFFIX}"))}
    raise UnknownName(
        f"no adapter is called {str(operand)!r}, nor is it a path. {nearest(str(operand), known)}"
    )


def _read(path: Path) -> StoredAdapter:
    if is_hf_peft(path):
        raise BadFile(
            f"{path} is in HF PEFT's format; write it as a file of ours first: graftwork convert {path}"
        )
    return read_own(path)
