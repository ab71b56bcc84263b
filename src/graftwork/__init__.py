"""graftwork: an executable reference architecture for parameter-efficient fine-tuning.

    import graftwork as gw

    adapter = gw.attach(model, gw.LoRA(rank=8), name="fr")

Names are found on first use, so importing graftwork costs little more than importing torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork import composition as composition
    from graftwork import continual as continual
    from graftwork import objectives as objectives
    from graftwork.adapters.convert import convert
    from graftwork.adapters.store import load, save
    from graftwork.adapters.swapping import swap
    from graftwork.analysis.cost import cost
    from graftwork.anatomy.resolve import anatomy_of as anatomy
    from graftwork.composition.verbs import add, combine, compose, negate, scale
    from graftwork.engine.adapter import Adapter
    from graftwork.engine.attach import attach, detach
    from graftwork.engine.lean_host import lean
    from graftwork.engine.merging import merge, unmerge
    from graftwork.engine.verbs import active, adapters, hints, route, trainable
    from graftwork.optimizers.galore import GaLore
    from graftwork.optimizers.natural_galore import NaturalGaLore
    from graftwork.reference.card import Card
    from graftwork.reference.catalogue import make, register, techniques
    from graftwork.reference.site import Site
    from graftwork.reference.technique import Technique
    from graftwork.reference.typology import compare, describe
    from graftwork.techniques.together import mam, unipelt
    from graftwork.training.evaluate import evaluate
    from graftwork.training.recipe import Recipe
    from graftwork.training.run import tune

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "graftwork.engine.adapter",
    "Card": "graftwork.reference.card",
    "GaLore": "graftwork.optimizers.galore",
    "NaturalGaLore": "graftwork.optimizers.natural_galore",
    "Recipe": "graftwork.training.recipe",
    "Site": "graftwork.reference.site",
    "Technique": "graftwork.reference.technique",
    "active": "graftwork.engine.verbs",
    "add": "graftwork.composition.verbs",
    "adapters": "graftwork.engine.verbs",
    "anatomy": "graftwork.anatomy.resolve:anatomy_of",
    "attach": "graftwork.engine.attach",
    "detach": "graftwork.engine.attach",
    "make": "graftwork.reference.catalogue",
    "compare": "graftwork.reference.typology",
    "combine": "graftwork.composition.verbs",
    "compose": "graftwork.composition.verbs",
    "convert": "graftwork.adapters.convert",
    "cost": "graftwork.analysis.cost",
    "describe": "graftwork.reference.typology",
    "evaluate": "graftwork.training.evaluate",
    "hints": "graftwork.engine.verbs",
    "lean": "graftwork.engine.lean_host",
    "load": "graftwork.adapters.store",
    "mam": "graftwork.techniques.together",
    "merge": "graftwork.engine.merging",
    "negate": "graftwork.composition.verbs",
    "register": "graftwork.reference.catalogue",
    "route": "graftwork.engine.verbs",
    "save": "graftwork.adapters.store",
    "scale": "graftwork.composition.verbs",
    "swap": "graftwork.adapters.swapping",
    "techniques": "graftwork.reference.catalogue",
    "trainable": "graftwork.engine.verbs",
    "tune": "graftwork.training.run",
    "unipelt": "graftwork.techniques.together",
    "unmerge": "graftwork.engine.merging",
}

_FOLDERS = frozenset({"composition", "continual", "objectives"})


def _public(name: str) -> Any:
    home, _, there = _HOMES[name].partition(":")
    return getattr(importlib.import_module(home), there or name)


class _Verb(ModuleType):
    """A folder with the name of a verb (`adapters`, `techniques`): importing it must not take the verb away."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return _public(self.__name__.rpartition(".")[2])(*args, **options)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and type(value) is ModuleType:
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return _public(name)
    if name in _FOLDERS:
        return importlib.import_module(f"graftwork.{name}")
    if name.startswith("_"):
        raise AttributeError(name)
    from graftwork.reference.catalogue import techniques

    for kind in techniques().values():
        if kind.__name__ == name:
            return kind
    raise AttributeError(f"module 'graftwork' has no attribute {name!r}")


def __dir__() -> list[str]:
    from graftwork.reference.catalogue import techniques

    return sorted([*_HOMES, *_FOLDERS, *(kind.__name__ for kind in techniques().values())])
