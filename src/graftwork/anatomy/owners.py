"""Which submodels of a model belong to a known family, and the anatomy of the whole that follows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from graftwork.anatomy.anatomy import Anatomy, Place, Places, Stack
from graftwork.anatomy.families import families
from graftwork.anatomy.measure import measure
from graftwork.anatomy.walk import children, expand, join, walk

_TASK = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|ImageClassification|MultipleChoice"
    r"|AudioClassification|VideoClassification)"
)
_SUFFIX = re.compile(r"_(model|tower|backbone)$")
_SHORT = {"language": "text"}


@dataclass(frozen=True)
class Owner:
    """A submodel of a known family, and the base model inside it (often the same module)."""

    path: str
    module: nn.Module
    base_path: str
    base: nn.Module
    anatomy: Anatomy


def owners(model: nn.Module) -> list[Owner]:
    """The outermost submodels of known families, in order."""
    return list(_visit("", model, set()))


def stranger(model: nn.Module) -> list[Owner]:
    """The model as owner of its base, by `base_model_prefix`, where its family is not known."""
    inner = str(getattr(model, "base_model_prefix", ""))
    base = model._modules.get(inner)
    if base is None or not _family(model) or _family(model) in families():
        return []
    return [Owner("", model, inner, base, Anatomy(families=(), stacks=()))]


def known_anatomy(found: list[Owner]) -> Anatomy:
    """The tables of the submodels as one, with paths from the root and stacks named apart."""
    parts = [_placed(owner, _name(owner) if len(found) > 1 else "") for owner in found]
    return merged(parts)


def merged(parts: list[Anatomy]) -> Anatomy:
    """Several anatomies of one model as one."""
    places: dict[str, tuple[Place | str, ...]] = {}
    for part in parts:
        for workspace, entry in part.places.items():
            places[workspace] = (
                *places.get(workspace, ()),
                *(entry if isinstance(entry, tuple) else (entry,)),
            )
    return Anatomy(
        families=tuple(dict.fromkeys(family for part in parts for family in part.families)),
        stacks=tuple(stack for part in parts for stack in part.stacks),
        places=places,
        unused=tuple(path for part in parts for path in part.unused),
    )


def head_places(found: list[Owner], taken: set[int]) -> Places:
    """Workspaces outside the bases, by the class of the model around each: task head or vocabulary."""
    listed: dict[str, tuple[Place | str, ...]] = {}
    for owner in found:
        for path, workspace in _outside(owner, taken):
            listed[workspace] = (*listed.get(workspace, ()), path)
    return listed


def _outside(owner: Owner, taken: set[int]) -> Iterator[tuple[str, str]]:
    vocabulary = _output_embedding(owner.module)
    task = _TASK.search(type(owner.module).__name__) is not None
    if vocabulary is None and not task:
        return
    tables = {id(m._parameters.get("weight")) for _, m in walk(owner.module) if isinstance(m, nn.Embedding)}
    inside = {id(m) for _, m in walk(owner.base)} if owner.base is not owner.module else set()
    for path, module in walk(owner.module, owner.path):
        if id(module) in taken | inside or measure(module) is None:
            continue
        tied = id(module._parameters.get("weight")) in tables
        if module is vocabulary or tied:
            yield path, "lm_head"
        else:
            yield path, "head" if task else "lm_head.transform"


def _output_embedding(module: nn.Module) -> nn.Module | None:
    try:
        return module.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _visit(path: str, module: nn.Module, seen: set[int]) -> Iterator[Owner]:
    if id(module) in seen:
        return
    seen.add(id(module))
    anatomy = families().get(_family(module))
    base = _base(path, module, anatomy) if anatomy else None
    if base is not None and anatomy is not None:
        yield Owner(path, module, *base, anatomy)
        return
    for name, child in children(module):
        yield from _visit(join(path, name), child, seen)


def _family(module: nn.Module) -> str:
    name = getattr(getattr(module, "config", None), "model_type", None)
    return name if isinstance(name, str) else ""


def _base(path: str, module: nn.Module, anatomy: Anatomy) -> tuple[str, nn.Module] | None:
    """The module where a table's paths start: the one behind `base_model_prefix`, or the module itself."""
    inner = str(getattr(module, "base_model_prefix", ""))
    below = module._modules.get(inner)
    for where, candidate in ((join(path, inner), below), (path, module)):
        if candidate is not None and any(expand(candidate, p) for s in anatomy.stacks for p in s.layers):
            return where, candidate
    return None


def _name(owner: Owner) -> str:
    last = _SUFFIX.sub("", owner.path.rpartition(".")[2])
    return _SHORT.get(last, last)


def _placed(owner: Owner, name: str) -> Anatomy:
    """A family's table with paths from the root of the whole model."""
    at = owner.base_path
    return Anatomy(
        families=owner.anatomy.families,
        stacks=tuple(_stack_at(stack, at, name, owner.base) for stack in owner.anatomy.stacks),
        places=_places_at(owner.anatomy.places, at),
        unused=tuple(join(at, path) for path in owner.anatomy.unused),
    )


def _stack_at(stack: Stack, at: str, name: str, base: nn.Module) -> Stack:
    config = getattr(base, "config", None)
    return replace(
        stack,
        name=join(name, stack.name),
        path=join(at, stack.path),
        layers=tuple(join(at, pattern) for pattern in stack.layers),
        around=_places_at(stack.around, at),
        causal=stack.causal or (not stack.name and bool(getattr(config, "is_decoder", False))),
    )


def _places_at(places: Places, at: str) -> Mapping[str, tuple[Place | str, ...]]:
    placed: dict[str, tuple[Place | str, ...]] = {}
    for workspace, entry in places.items():
        entries = entry if isinstance(entry, tuple) else (entry,)
        placed[workspace] = tuple(
            replace(one, path=join(at, one.path)) if isinstance(one, Place) else join(at, one)
            for one in entries
        )
    return placed
