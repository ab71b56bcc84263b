"""Models never seen: an anatomy read off the modules' names and shapes.

Layers are children of one class, repeated in a ModuleList or Sequential (or several such runs of like
names, as the stages of a convolutional network); plain Sequentials are looked through. What lies inside a
layer is told by `roles`. Outside layers, a linear layer is the task head when it is the last one under a
top-level name that can mean nothing else (`classifier`, `fc`, `head`, ...; beside a base of a known
family, each one under it), a projection to the vocabulary when it shares or mirrors an embedding, and
`linear` otherwise: nothing in a plain Sequential is a head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from graftwork.anatomy.anatomy import Anatomy, Place, Stack
from graftwork.anatomy.measure import Measure, measure
from graftwork.anatomy.roles import Role, attention_modules, attention_outside, is_attention, roles
from graftwork.anatomy.walk import children, expand, join, walk
from graftwork.reference.site import Kind

_RUN_NAME = re.compile(r"(^h|layers?|blocks?)$")
_HEADS = {"classifier", "fc", "head", "heads", "score", "qa_outputs", "classification_head", "cls_head"}
_STACKS = {
    "encoder": "encoder",
    "decoder": "decoder",
    "visual": "vision",
    "vision": "vision",
    "image": "vision",
    "text": "text",
    "language": "text",
}
_CAUSAL = re.compile(r"CausalLM|LMHead|GPT")
_NO_ATTENTION = "no attention was found in it"
_NO_SEQUENCE = (
    "its family is not in the anatomy, and how it takes masks and positions cannot be told from its modules"
)

Found = tuple[str, nn.Module]


def discover(model: nn.Module, taken: set[int], others: bool = False) -> Anatomy:
    """The anatomy of all modules that are not `taken` (by id), with paths from the root.

    Args:
        others: stacks of known families exist beside, so a discovered one needs a name.
    """
    if all(id(m) in taken or measure(m) is None for _, m in walk(model)):
        return Anatomy(families=(), stacks=())
    runs: dict[tuple[str, str], list[Found]] = {}
    for container, path, layer in _layers("", model, taken):
        runs.setdefault((_class_of(layer), re.sub(r"\d+", "*", container)), []).append((path, layer))
    inside = {id(m) for layers in runs.values() for _, layer in layers for _, m in walk(layer)}
    outside = list(_outside(model, taken | inside, bool(runs or others), others))
    causal = any(workspace == "lm_head" for workspace, _ in outside) or _CAUSAL.search(type(model).__name__)
    names = _names([key[1] for key in runs], others)
    stacks = [_stack(layers, name, bool(causal)) for layers, name in zip(runs.values(), names, strict=True)]
    return _arranged(stacks, outside)


def _arranged(stacks: list[Stack], outside: list[Role]) -> Anatomy:
    """Places outside layers go to the stack whose module holds them, the others to none."""
    around: dict[str, dict[str, tuple[Place | str, ...]]] = {stack.name: {} for stack in stacks}
    places: dict[str, tuple[Place | str, ...]] = {}
    for workspace, place in outside:
        homes = (stack.name for stack in stacks if stack.path and place.path.startswith(f"{stack.path}."))
        home = next(homes, None)
        entry = places if home is None else around[home]
        entry[workspace] = (*entry.get(workspace, ()), place)
    placed = tuple(replace(stack, around=around[stack.name]) for stack in stacks)
    return Anatomy(families=(), stacks=placed, places=places)


def _layers(path: str, module: nn.Module, taken: set[int]) -> Iterator[tuple[str, str, nn.Module]]:
    """(path of the run, path, module) of every layer below a module."""
    repeated = _repeated(path, module, taken)
    for name, child in children(module):
        here = join(path, name)
        if id(child) in taken:
            continue
        below = list(_layers(here, child, taken))
        if _class_of(child) in repeated and not (below and _is_stage(child, below)):
            yield path, here, child
        else:
            yield from below


def _repeated(path: str, module: nn.Module, taken: set[int]) -> set[str]:
    """Classes of the composite children that repeat in a run; a run of one counts under a telling name."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return set()
    kinds = [_class_of(child) for _, child in children(module) if _composite(child, taken)]
    least = 1 if len(kinds) == 1 and _RUN_NAME.search(path.rpartition(".")[2]) else 2
    return {kind for kind in kinds if kinds.count(kind) >= least}


def _composite(module: nn.Module, taken: set[int]) -> bool:
    if (
        isinstance(module, nn.ModuleList | nn.Sequential | nn.MultiheadAttention)
        or measure(module) is not None
    ):
        return False
    return any(id(m) not in taken and measure(m) is not None for _, m in walk(module))


def _is_stage(module: nn.Module, below: list[tuple[str, str, nn.Module]]) -> bool:
    """Whether a repeated child only groups layers: they are more than one weight and its norm each, and
    there is no attention beside them (experts are no layers)."""
    if all(_weights(layer) < 2 for _, _, layer in below):
        return False
    inner = {id(m) for _, _, layer in below for _, m in walk(layer)}
    return not any(is_attention(m) for _, m in walk(module) if id(m) not in inner)


def _weights(module: nn.Module) -> int:
    found = (measure(m) for _, m in walk(module))
    return sum(one is not None and one.kind is not Kind.NORM for one in found)


def _stack(layers: list[Found], name: str, causal: bool) -> Stack:
    places: dict[str, tuple[Place | str, ...]] = {}
    attention: dict[str, str] = {}
    for _, layer in layers:
        for workspace, place in roles(layer):
            entry = places.get(workspace, ())
            places[workspace] = entry if place in entry else (*entry, place)
        for workspace, inner in attention_modules(layer):
            attention.setdefault(workspace, inner)
    parents = [path.rpartition(".")[0] for path, _ in layers]
    return Stack(
        name=name,
        path=_common(parents).rpartition(".")[0] if len(set(parents)) == 1 else _common(parents),
        layers=tuple(path for path, _ in layers),
        places=places,
        attention=attention.get("attention"),
        cross_attention=attention.get("cross_attention"),
        attention_reason="" if attention else _NO_ATTENTION,
        sequence=None,
        sequence_reason=_NO_SEQUENCE,
        causal=_causal(layers, attention.get("attention"), causal),
        channel_axis=1 if "conv" in places and not attention else -1,
    )


def _causal(layers: list[Found], attention: str | None, generates: bool) -> bool:
    """By the attention modules' own word, else whether the model generates: looking back only is safe."""
    if attention is None:
        return False
    told = [getattr(m, "is_causal", None) for _, layer in layers for _, m in expand(layer, attention)]
    known = [value for value in told if isinstance(value, bool)]
    return any(known) if known else generates


def _common(paths: list[str]) -> str:
    split = [path.split(".") for path in paths]
    same: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        same.append(parts[0])
    return ".".join(same)


def _names(containers: list[str], others: bool) -> list[str]:
    """Names of the stacks, unique; none is needed for a lone one."""
    if len(containers) == 1 and not others:
        return [""]
    names: list[str] = []
    for container in containers:
        segments = [part for part in container.replace("*", "").split(".") if part]
        told = next((name for part in segments for word, name in _STACKS.items() if word in part), None)
        plain = [part for part in segments if not _RUN_NAME.search(part)] or segments or ["stack"]
        name = told or plain[-1]
        while name in names:
            name = f"{name}_"
        names.append(name)
    return names


def _outside(model: nn.Module, taken: set[int], stacked: bool, known: bool) -> Iterator[Role]:
    """(workspace, place) of every loose module outside layers."""
    attention = attention_outside(model, taken)
    yield from attention
    taken = taken | {id(model.get_submodule(place.path)) for _, place in attention}
    loose = [
        (p, m, found) for p, m in walk(model) if id(m) not in taken and (found := measure(m)) is not None
    ]
    tables = [m for _, m in walk(model) if isinstance(m, nn.Embedding)]
    heads = _head_paths(loose, whole=known)
    for path, module, found in loose:
        if found.kind is Kind.LINEAR:
            vocabulary = _is_vocabulary(path, module, found, tables)
            yield ("lm_head" if vocabulary else "head" if path in heads else "linear"), Place(path)
        else:
            yield _plain_role(path, found, stacked), Place(path)


def _head_paths(loose: list[tuple[str, nn.Module, Measure]], whole: bool) -> set[str]:
    """Linear layers under a head's name: all (the user's own head, beside a known base) or the last."""
    named: dict[str, list[str]] = {}
    for path, _, found in loose:
        name = path.partition(".")[0]
        if name in _HEADS and found.kind is Kind.LINEAR:
            named.setdefault(name, []).append(path)
    return {path for paths in named.values() for path in (paths if whole else paths[-1:])}


def _is_vocabulary(path: str, module: nn.Module, found: Measure, tables: list[nn.Embedding]) -> bool:
    if any(module._parameters.get("weight") is table._parameters.get("weight") for table in tables):
        return True
    last = path.rpartition(".")[2]
    return last in {"lm_head", "head", "output", "decoder", "fc", "fc_out", "out", "proj_out"} and any(
        found.width_out == table.num_embeddings and found.width_in == table.embedding_dim for table in tables
    )


def _plain_role(path: str, found: Measure, stacked: bool) -> str:
    if found.kind is Kind.EMBEDDING:
        return next((role for word, role in _TABLES.items() if word in path.rpartition(".")[2]), "embedding")
    if found.kind is Kind.CONVOLUTION:
        return "embedding" if re.search("patch|embed", path) else "conv"
    return "norm.final" if stacked else "norm"


_TABLES = {"pos": "embedding.position", "wpe": "embedding.position", "type": "embedding.type",
           "segment": "embedding.type"}  # fmt: skip


def _class_of(module: nn.Module) -> str:
    """A class by name: a module that takes part in an adapter has a class of its own with the same name."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"
