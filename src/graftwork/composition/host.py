"""What an attached adapter's host holds at the adapter's sites."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from graftwork.adapters.manifest import Owner
from graftwork.composition.operands import Operand
from graftwork.engine.adapter import Placed
from graftwork.engine.placing import bias, matrix
from graftwork.engine.verbs import adapters
from graftwork.errors import NotComposable
from graftwork.reference.site import Site
from graftwork.reference.technique import Technique


def host_value(operand: Operand, technique: Technique, owner: Owner) -> Tensor:
    """What a trained copy of a host's value starts at, from the host. Raises NotComposable for a file."""
    if operand.model is None:
        raise NotComposable(
            f"{technique.name} trains copies of the base's values, so a sum whose weights do not add up to 1 needs "
            f"the base, and {operand.label!r} is a file: attach the adapters to their base (gw.load) and compose "
            "there"
        )
    place = next(p for p in placed(operand) if (p.site.key, p.graft.technique) == (owner.key, technique.name))
    module = technique.build(with_host(operand.model, place.site))
    return module.state_dict()[owner.name].cpu()


def placed(operand: Operand) -> tuple[Placed, ...]:
    """The modules of an attached operand."""
    assert operand.model is not None
    return adapters(operand.model)[operand.label].placed


def with_host(model: nn.Module, site: Site) -> Site:
    """The site with access to the host's weight and bias."""
    return replace(site, matrix=matrix(model, site), bias=bias(model, site))
