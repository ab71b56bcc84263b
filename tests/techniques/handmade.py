"""Sites made by hand: a Transformer layer with the widths of the typology's numeric table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.engine.seat import Graft
from graftwork.reference.site import Kind, Side, Site
from graftwork.reference.technique import Technique
from graftwork.techniques.bottleneck_adapter import BottleneckAdapter

WIDTH, NARROW, WIDE, LENGTH, VOCABULARY = 16, 4, 64, 5, 23


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(workspace: str, out: int = WIDTH, into: int = WIDTH, bias: bool = True) -> Site:
    return Site(
        key=f"0/{workspace}",
        workspace=workspace,
        kind=Kind.LINEAR,
        module=workspace,
        layer=0,
        layers=1,
        width_in=into,
        width_out=out,
        channels_in=into,
        channels_out=out,
        has_bias=bias,
        matrix=lambda: values(out, into),
        bias=(lambda: values(out, seed=1)) if bias else None,
    )


QUERY, KEY, VALUE = linear("attention.query"), linear("attention.key"), linear("attention.value")
ATTENTION_OUT, FEEDFORWARD = linear("attention"), linear("feedforward")
BIASLESS = linear("attention.query", bias=False)
INNER = Site(
    key="0/feedforward.activation",
    workspace="feedforward.activation",
    kind=Kind.LINEAR,
    module="down",
    layer=0,
    side=Side.INPUT,
    width_in=WIDE,
    width_out=WIDTH,
    channels_in=WIDE,
    channels_out=WIDTH,
)
ATTENTION = Site(
    key="0/attention",
    workspace="attention",
    kind=Kind.ATTENTION,
    module="attention",
    layer=0,
    key_width=WIDTH,
    value_width=WIDTH,
    heads=2,
)
STACK = Site(
    key="embedding",
    workspace="embedding",
    kind=Kind.STACK,
    module="model",
    channels_in=WIDTH,
    channels_out=WIDTH,
    matrix=lambda: 3 * values(WIDTH, VOCABULARY),
)
NORM = Site(
    key="0/norm",
    workspace="norm",
    kind=Kind.NORM,
    module="norm",
    layer=0,
    width_in=WIDTH,
    width_out=WIDTH,
    channels_in=WIDTH,
    channels_out=WIDTH,
    has_bias=True,
    matrix=lambda: values(WIDTH),
    bias=lambda: values(WIDTH, seed=1),
)
EMBEDDING = Site(
    key="embedding",
    workspace="embedding",
    kind=Kind.EMBEDDING,
    module="table",
    width_in=VOCABULARY,
    width_out=WIDTH,
    channels_out=WIDTH,
    matrix=lambda: values(WIDTH, VOCABULARY),
)
EXPERTS = Site(
    key="0/experts.down",
    workspace="experts.down",
    kind=Kind.PARAMETER,
    module="experts",
    parameter="down_proj",
    layer=0,
    batch=(3,),
    width_in=WIDE,
    width_out=WIDTH,
    matrix=lambda: values(3, WIDTH, WIDE),
)
# What some techniques must be told, or need at the narrow sites here.
NEEDS: dict[str, dict[str, Any]] = {
    "adapter-fusion": {"of": ("nli", "sentiment")},
    "oft": {"block": 4},
    "adalora": {"total_steps": 10},
    "miss": {"rank": 8},
    "shira": {"rank": 4},
    "fourierft": {"count": 40},
    "randlora": {"rank": 6},
}
HOMES: dict[str, Site] = {"sequence": STACK, "attention": ATTENTION, "hidden": FEEDFORWARD, "weight": QUERY}


def smallest(kind: type[Technique]) -> Technique:
    """The technique with its defaults, as far as they can be had at the sites here."""
    return kind(**NEEDS.get(kind.name, {}))


def build(technique: Technique, sites: Sequence[Site]) -> list[nn.Module]:
    """The modules of one adapter, with what they share and whom they meet."""
    modules = [technique.build(site) for site in sites]
    for module, site in zip(modules, sites, strict=True):
        if technique.others():
            module.meet({name: (partner(name, site),) for name in technique.others()})  # type: ignore[operator]
    shared = technique.shared(sites)
    if shared is not None:
        for module in modules:
            module.adopt(shared)  # type: ignore[operator]
    return modules


def partner(name: str, site: Site) -> Graft:
    """What another adapter has at a site."""
    technique = BottleneckAdapter(width=NARROW)
    with torch.device("cpu"):
        module = jittered(technique.build(site), seed=len(name))
    return Graft(name, technique.name, site, technique.card, module)


def build_one(technique: Technique, site: Site | None = None) -> nn.Module:
    return build(technique, [site or HOMES[technique.card.port.value]])[0]


def count(modules: Sequence[nn.Module]) -> int:
    """Trainable values, each tensor once."""
    tensors = {id(tensor): tensor for module in modules for tensor in module.parameters()}
    return sum(tensor.numel() for tensor in tensors.values())


def jittered(module: nn.Module, seed: int = 7, size: float = 1.0) -> nn.Module:
    """The module in float64, all its tensors random."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.copy_(size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return module
