"""What a run trains: one adapter, or one for each context with a route between them, and what joins two bases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from graftwork.anatomy.resolve import head_sites
from graftwork.engine.adapter import Adapter
from graftwork.engine.attach import attach
from graftwork.engine.verbs import route, trainable
from graftwork.errors import BadRecipe
from graftwork.reference.technique import Technique
from graftwork.routing import ByToken
from graftwork.training.calibration import calibration
from graftwork.training.fresh import new_parts, with_fresh
from graftwork.training.joined import connector_of
from graftwork.training.materials import Materials, originals
from graftwork.training.recipe import NAME, Recipe
from graftwork.training.result import spelled
from graftwork.training.tokens import check_seen, check_served, router

Plan = Mapping[str, Sequence[Technique]]


@dataclass(frozen=True)
class Grafted:
    """Adapters by name, and the connector of a model made of two bases, which is trained in its place."""

    adapters: Mapping[str, Adapter]
    connector: nn.Module | None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that is trained, each once."""
        for adapter in self.adapters.values():
            yield from adapter.parameters()
        if self.connector is not None:
            yield from self.connector.parameters()

    def count(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters())

    def spelled(self) -> tuple[str, ...]:
        """The techniques as `repr` spells them, those of a context behind its name."""
        return tuple(
            spelled(technique) if name == NAME else f"{name}: {spelled(technique)}"
            for name, adapter in self.adapters.items()
            for technique in adapter.techniques
        )

    def rates(self, model: nn.Module) -> Callable[[str], float]:
        """Learning-rate factor of a parameter by its name in the model; 1 where its technique says nothing."""
        by_tensor: dict[int, float] = {}
        for adapter in self.adapters.values():
            for place in adapter.placed:
                rates = adapter.techniques[place.index].learning_rates()
                for name, parameter in place.graft.module.named_parameters():
                    by_tensor[id(parameter)] = rates.get(name.rpartition(".")[2], 1.0)
        named = {name: by_tensor.get(id(parameter), 1.0) for name, parameter in model.named_parameters()}
        return lambda name: named[name]


def planned(recipe: Recipe, materials: Materials) -> Plan:
    """Adapter name -> techniques, once the base is known."""
    plan = {name: [t.tokenized(materials.ids) for t in ts] for name, ts in recipe.adapters().items()}
    if recipe.contexts is None:
        return {name: with_fresh(materials.model, techniques) for name, techniques in plan.items()}
    _refuse_new_parts(materials)
    return plan


def graft(recipe: Recipe, materials: Materials, plan: Plan) -> Grafted:
    """Attach what is planned; contexts with their route. Raises BadRecipe where contexts cannot work."""
    model = materials.model
    by = _router(recipe, materials)
    made = {name: _attached(recipe, materials, name, techniques) for name, techniques in plan.items()}
    connector = connector_of(model).requires_grad_() if recipe.model.pair else None
    if by is not None:
        trainable(model, *made)
        route(model, list(made), by=by)
        check_seen(materials)
    return Grafted(made, connector)


def _router(recipe: Recipe, materials: Materials) -> ByToken | None:
    if recipe.contexts is None:
        return None
    reader, dropout = materials.preprocessor, recipe.training.context_dropout
    by = router(recipe.contexts, materials.model, reader, dropout=dropout)
    check_served(recipe.contexts, by, reader, materials.splits["train"])
    return by


def _attached(recipe: Recipe, materials: Materials, name: str, techniques: Sequence[Technique]) -> Adapter:
    batches = calibration(materials, techniques, recipe.training)
    before = originals(recipe.model, materials.task, techniques)
    return attach(materials.model, techniques, name=name, calibration=batches, originals=before)


def _refuse_new_parts(materials: Materials) -> None:
    """A head or another part that the base lacks would have to be in one context, and the others would lack it."""
    new = [site.module for site in head_sites(materials.model)]
    new += new_parts(materials.model)
    if new:
        raise BadRecipe(
            f"contexts: {materials.task.name} puts new parts on this base ({', '.join(new)}), which no single context "
            "can hold; take a task of language modelling or captioning"
        )
