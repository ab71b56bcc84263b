"""Bare parameters: what a model reads that is no module's weight or bias, such as a class token or Mamba's `A_log`.

Each is a workspace of its own, `parameter.A_log`, in the layer it lies in. Left out: what is the same tensor as a
weight that a workspace has, what a module computes its weight from (parametrisations), and recurrent layers of torch,
whose kernels read a list of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn

from graftwork.anatomy.anatomy import Anatomy, Place, Places, Stack
from graftwork.anatomy.measure import tensor
from graftwork.anatomy.survey import Run, Survey
from graftwork.anatomy.walk import join, walk
from graftwork.reference.site import Access

PREFIX = "parameter"


def with_bare(model: nn.Module, anatomy: Anatomy, found: Survey) -> Anatomy:
    """The anatomy with the bare parameters that its survey did not come by."""
    left = _Left(anatomy.unused, found)
    inside = {id(run.stack): _stack(run, left) for run in found.runs}
    return replace(
        anatomy,
        stacks=tuple(inside.get(id(stack), stack) for stack in anatomy.stacks),
        places={**anatomy.places, **_grouped(left.places("", model))},
    )


def _stack(run: Run, left: _Left) -> Stack:
    """The places of all layers together; a layer that lacks one is passed over when they are looked up."""
    found = [place for layer in run.layers for place in left.places(layer.path, layer.module)]
    return replace(run.stack, places={**run.stack.places, **_grouped(found)})


def _grouped(places: Iterable[Place]) -> Places:
    found: dict[str, tuple[Place, ...]] = {}
    for place in dict.fromkeys(places):
        workspace = f"{PREFIX}.{place.parameter}"
        found[workspace] = (*found.get(workspace, ()), place)
    return found


class _Left:
    """The parameters that are not yet anybody's."""

    def __init__(self, unused: tuple[str, ...], found: Survey) -> None:
        self.unused = unused
        self.taken: set[int] = set()
        self.whole: set[int] = set()  # modules all of whose parameters belong to their weight and bias
        for spot in found.spots():
            if spot.measure is None:
                continue
            if spot.place.parameter is None:
                self.whole.add(id(spot.module))
                self.taken.update(id(p) for p in spot.module._parameters.values())
            else:
                self.taken.add(id(tensor(spot.module, spot.place.parameter)))

    def places(self, path: str, root: nn.Module) -> Iterator[Place]:
        """Each parameter below a module that nobody has asked for before, with its path from there."""
        for inner, module in walk(root):
            if (
                id(module) in self.whole
                or isinstance(module, nn.RNNBase)
                or "parametrizations" in inner.split(".")
            ):
                continue
            for name, stored in module._parameters.items():
                if stored is None or id(stored) in self.taken or not stored.is_floating_point():
                    continue
                self.taken.add(id(stored))
                if join(path, inner, name) not in self.unused and join(path, inner) not in self.unused:
                    yield Place(inner, parameter=name, bare=True, access=Access.READ)
