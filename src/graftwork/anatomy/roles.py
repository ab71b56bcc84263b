"""What the modules inside one unknown layer do, by their names and shapes.

Attention is a module with query, key and value projections (or one fused) under usual names, and the
output projection beside them; `nn.MultiheadAttention` is known as it is. Of the remaining linear layers,
one or two that widen and one that narrows back are a feed-forward. Anything left is `linear`, `conv`,
`norm`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from graftwork.anatomy.anatomy import Layout, Part, Place
from graftwork.anatomy.measure import Measure, measure, measure_parameter
from graftwork.anatomy.walk import children, expand, join, walk
from graftwork.reference.site import Access, Kind

_WORDS = {"query": "q", "key": "k", "value": "v"}
_NAMES = {
    part: {word.format(n) for n in (part, letter) for word in _SHAPES}
    for _SHAPES in [
        ("{}", "{}_proj", "proj_{}", "{}_lin", "to_{}", "w{}", "w_{}", "{}_linear", "linear_{}", "{}_layer")
    ]
    for part, letter in _WORDS.items()
}
# fmt: off
_FUSED = {
    "qkv", "qkv_proj", "proj_qkv", "to_qkv", "wqkv", "w_qkv", "w_pack", "query_key_value", "c_attn",
    "in_proj", "attn_qkv", "qkv_linear",
}
_OUTPUT = {
    "o", "out", "o_proj", "out_proj", "output_proj", "proj_out", "c_proj", "proj", "dense", "out_lin",
    "to_out", "wo", "w_o", "o_linear", "linear_out", "output", "fc",
}
# fmt: on
_CROSS = re.compile(r"cross|encoder_attn|encdec|enc_dec|multihead_attn|attn2|src_attn", re.IGNORECASE)
_GATE = re.compile(r"gate|^w1$|^wi_0$")
_SSM = {
    "in_proj": "ssm.in",
    "conv1d": "ssm.conv",
    "x_proj": "ssm.x",
    "dt_proj": "ssm.dt",
    "out_proj": "ssm.out",
}
_SSM_ACCESS = {
    "conv1d": Access.READ,
    "dt_proj": Access.READ,
    "x_proj": Access.EITHER,
    "out_proj": Access.EITHER,
}
_PLAIN = {
    Kind.LINEAR: "linear",
    Kind.CONVOLUTION: "conv",
    Kind.NORM: "norm",
    Kind.EMBEDDING: "embedding.position",
}

Role = tuple[str, Place]


@dataclass(frozen=True)
class _Leaf:
    path: str
    measure: Measure

    @property
    def name(self) -> str:
        """The last segment that is no number."""
        return next((part for part in reversed(self.path.split(".")) if not part.isdigit()), "").lower()

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]


def roles(layer: nn.Module) -> list[Role]:
    """(workspace, place) of every module with a weight inside a layer, paths relative to it."""
    leaves = {p: _Leaf(p, known) for p, m in walk(layer) if (known := measure(m)) is not None}
    found = [*_multihead(layer), *_state_space(layer, leaves), *_experts(layer)]
    _drop(leaves, found)
    attention = list(_attention(layer, leaves))
    _drop(leaves, attention)
    feedforward = list(_feedforward(leaves))
    _drop(leaves, feedforward)
    rest = [(_PLAIN[leaf.measure.kind], Place(leaf.path)) for leaf in leaves.values()]
    return [*found, *attention, *feedforward, *rest]


def attention_outside(model: nn.Module, taken: set[int]) -> list[Role]:
    """Projections of attention modules that belong to no layer; paths from the root."""
    leaves = {p: _Leaf(p, known) for p, m in walk(model) if (known := measure(m)) is not None}
    found = [*_multihead(model), *_attention(model, leaves)]
    return [
        (workspace, place)
        for workspace, place in found
        if "." in workspace and id(model.get_submodule(place.path)) not in taken
    ]


def attention_modules(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """(`attention` or `cross_attention`, path) of the attention modules of a layer."""
    for path, module in walk(layer):
        if is_attention(module):
            yield _which(path), path


def is_attention(module: nn.Module) -> bool:
    """Whether a module holds query, key and value projections itself."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if "A_log" in module._parameters:
        return False
    return _projections(module) is not None


def _projections(module: nn.Module) -> dict[str, str] | None:
    """query, key and value (or qkv) -> child name, None where the module does not hold them all."""
    names = {name.lower(): name for name, child in children(module) if _is_linear(child)}
    split = {part: names[low] for part, known in _NAMES.items() for low in names if low in known}
    if len(split) == 3:
        return split
    fused = next((names[low] for low in names if low in _FUSED), None)
    if fused is None:
        return None
    found = measure(module._modules[fused])  # type: ignore[arg-type]
    return {"qkv": fused} if found is not None and found.width_out > found.width_in else None


def _is_linear(module: nn.Module) -> bool:
    found = measure(module)
    return found is not None and found.kind is Kind.LINEAR


def _multihead(layer: nn.Module) -> Iterator[Role]:
    for path, module in walk(layer):
        if not isinstance(module, nn.MultiheadAttention):
            continue
        which = _which(path)
        yield which, Place(path)
        if module._parameters.get("in_proj_weight") is not None:
            yield f"{which}.qkv", Place(path, parameter="in_proj_weight")
        for index, part in enumerate(_WORDS):
            if module._parameters.get("in_proj_weight") is not None:
                yield f"{which}.{part}", Place(path, Part(index, Layout.EQUAL), parameter="in_proj_weight")
            else:
                yield f"{which}.{part}", Place(path, parameter=f"{_WORDS[part]}_proj_weight")
        yield f"{which}.output", Place(join(path, "out_proj"), access=Access.READ)


def _state_space(layer: nn.Module, leaves: dict[str, _Leaf]) -> Iterator[Role]:
    for path, module in walk(layer):
        if "A_log" not in module._parameters:
            continue
        for name, workspace in _SSM.items():
            if join(path, name) in leaves:
                yield workspace, Place(join(path, name), access=_SSM_ACCESS.get(name, Access.CALLED))


def _experts(layer: nn.Module) -> Iterator[Role]:
    """Fused expert weights shaped (experts, 2 f, d) and (experts, d, f), and the router beside them."""
    for path, module in walk(layer):
        up, down = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
        if up is None or down is None or up.dim() != 3 or up.shape[1:] != (2 * down.shape[2], down.shape[1]):
            continue
        above = path.rpartition(".")[0]
        router = next((name for name in ("gate", "router") if _is_router(layer, join(above, name))), None)
        yield "feedforward", Place(above)
        if router is not None:
            yield "router", Place(join(above, router), parameter="weight")
        yield "experts.gate_up", Place(path, parameter="gate_up_proj")
        yield "experts.down", Place(path, parameter="down_proj")


def _is_router(layer: nn.Module, path: str) -> bool:
    hits = expand(layer, path)
    return bool(hits) and measure(hits[0][1]) is None and measure_parameter(hits[0][1], "weight") is not None


def _attention(layer: nn.Module, leaves: dict[str, _Leaf]) -> Iterator[Role]:
    for path, module in walk(layer):
        if isinstance(module, nn.MultiheadAttention) or not is_attention(module):
            continue
        which, inside = _which(path), _projections(module) or {}
        for part, name in inside.items():
            yield f"{which}.{part}", Place(join(path, name))
        output = _output(path, {join(path, name) for name in inside.values()}, leaves)
        if output is not None:
            yield f"{which}.output", Place(output)


def _output(path: str, projections: set[str], leaves: dict[str, _Leaf]) -> str | None:
    """The output projection: inside the attention module, or beside it within a module that holds both."""
    widest = max(leaves[p].measure.width_out for p in projections)
    around = [path, *([path.rpartition(".")[0]] if "." in path else [])]
    for place in around:
        for leaf in leaves.values():
            below = leaf.path.startswith(f"{place}.") if place else "." not in leaf.path
            fits = leaf.measure.kind is Kind.LINEAR and leaf.measure.width_in <= widest
            if below and fits and leaf.path not in projections and leaf.name in _OUTPUT:
                return leaf.path
    return None


def _feedforward(leaves: dict[str, _Leaf]) -> Iterator[Role]:
    linears = [leaf for leaf in leaves.values() if leaf.measure.kind is Kind.LINEAR]
    by_parent: dict[str, list[_Leaf]] = {}
    for leaf in linears:
        if leaf.name == "router" or (
            leaf.name == "gate" and any("experts" in other.path for other in linears)
        ):
            yield "router", Place(leaf.path)
        else:
            by_parent.setdefault(leaf.parent, []).append(leaf)
    lone = [leaf for group in by_parent.values() if len(group) == 1 for leaf in group]
    for group in [*(group for group in by_parent.values() if len(group) > 1), lone]:
        yield from _widen_then_narrow(group)


def _widen_then_narrow(group: list[_Leaf]) -> Iterator[Role]:
    downs = [leaf for leaf in group if leaf.measure.width_in > leaf.measure.width_out]
    if len(downs) != 1:
        return
    inner, outer = downs[0].measure.width_in, downs[0].measure.width_out
    ups = [
        leaf
        for leaf in group
        if leaf.measure.width_in == outer and leaf.measure.width_out in (inner, 2 * inner)
    ]
    named = _first_projections(ups, inner)
    yield from named
    if named:
        yield "feedforward.down", Place(downs[0].path)


def _first_projections(ups: list[_Leaf], inner: int) -> list[Role]:
    if len(ups) == 1:
        return [
            (
                "feedforward.up" if ups[0].measure.width_out == inner else "feedforward.gate_up",
                Place(ups[0].path),
            )
        ]
    if len(ups) != 2 or any(up.measure.width_out != inner for up in ups):
        return []
    gate = next((up for up in ups if _GATE.search(up.name)), ups[0])
    other = ups[1] if gate is ups[0] else ups[0]
    return [("feedforward.gate", Place(gate.path)), ("feedforward.up", Place(other.path))]


def _which(path: str) -> str:
    return "cross_attention" if _CROSS.search(path) else "attention"


def _drop(leaves: dict[str, _Leaf], found: Iterable[Role]) -> None:
    for _, place in found:
        leaves.pop(place.path, None)
