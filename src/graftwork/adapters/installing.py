"""Between a model and an adapter in memory: a snapshot of one, and putting one on, all or nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from graftwork.adapters.base import BaseIdentity, class_name, differences, identify
from graftwork.adapters.container import writable
from graftwork.adapters.format import both_directions
from graftwork.adapters.manifest import Owner, place_of
from graftwork.adapters.stored import SHARED, StoredAdapter, assemble
from graftwork.anatomy.resolve import all_sites
from graftwork.engine.adapter import Adapter, Placed, stored_tensors
from graftwork.engine.attach import attach, detach, require, state_of
from graftwork.engine.seat import seat_of
from graftwork.engine.verbs import adapters, as_found
from graftwork.errors import BadFile, CardConflict, NothingMatches, PortUnavailable, StateError, WrongBase

TASK_WORKSPACES = ("head", "lm_head", "pooler")


def snapshot(model: nn.Module, name: str) -> StoredAdapter:
    """An attached adapter as a file holds it. Raises UnknownName; StateError while merged; BadFile."""
    state = state_of(model)
    adapter = require(state, name)
    refuse_merged(model, "saving")
    owned: dict[Owner, Tensor] = {}
    written: set[int] = set()
    for place in adapter.placed:
        held = {own: id(tensor) for own, tensor in place.graft.module.state_dict(keep_vars=True).items()}
        for own, tensor in stored_tensors(place.graft.module).items():
            owner = _owner(place, own)
            if owner not in owned and held.get(own) not in written:
                owned[owner] = writable(tensor, f"{name}: {owner.key}.{owner.name}")
        written |= set(held.values())
    techniques = tuple(technique.stored() for technique in adapter.techniques)
    places = {key: place_of(model, site) for key, site in adapter.sites.items()}
    labels = _labels(model) if any(site.workspace == "head" for site in adapter.sites.values()) else None
    return assemble(name, techniques, owned, places, base_of(model), task_of(model), labels)


def install(
    model: nn.Module,
    stored: StoredAdapter,
    name: str,
    *,
    to_train: bool = False,
    allow_other_base: bool = False,
) -> Adapter:
    """Put an adapter on a model, active, frozen unless `to_train`. On any error the model is as before.

    Raises:
        WrongBase: the file was made for another base. BadFile: its tensors do not fit.
        StateError: the model is merged, or has an adapter of that name.
    """
    refuse_merged(model, "loading")
    if not allow_other_base:
        check_base(model, stored.manifest.base, name)
    training = {id(p): p.requires_grad for adapter in adapters(model).values() for p in adapter.parameters()}
    trained = state_of(model).training if adapters(model) else ()
    with _all_or_nothing(model, name):
        adapter = _attached(model, stored, name)
        adapter.load_tensors(fitting(adapter, stored))
        for other in adapters(model).values():
            for parameter in other.parameters():
                parameter.requires_grad_(training.get(id(parameter), to_train))
        state_of(model).training = (*trained, *([name] if to_train else []))
    return adapter


def _attached(model: nn.Module, stored: StoredAdapter, name: str) -> Adapter:
    try:
        return attach(model, stored.manifest.techniques, name=name, head=False)
    except (NothingMatches, PortUnavailable, CardConflict) as error:
        raise BadFile(f"adapter {name!r} does not fit this {type(model).__name__}: {error}") from error


def check_base(model: nn.Module, base: BaseIdentity, name: str) -> None:
    """Raise WrongBase with everything in which the model is not the adapter's base."""
    check_identity(base_of(model), base, name)


def check_identity(here: BaseIdentity, base: BaseIdentity, name: str) -> None:
    """The same, for a model whose identity is known."""
    found = differences(base, here)
    if found:
        raise WrongBase(
            f"adapter {name!r} was made for another base ({base.architecture}, fingerprint "
            f"{base.fingerprint}): {'; '.join(found)}. Load the base it was trained on, or pass "
            "allow_other_base=True"
        )


def base_of(model: nn.Module) -> BaseIdentity:
    """The identity of the model under its adapters."""
    brought = [tensor for adapter in adapters(model).values() for tensor in adapter.parameters()]
    tasks = {site.module for site in all_sites(model) if site.workspace in TASK_WORKSPACES}
    return identify(model, brought, tasks)


def task_of(model: nn.Module) -> str:
    """What the class of the model says it is for: `SequenceClassification`, empty for a bare model."""
    name = class_name(model)
    if name.endswith(("LMHeadModel", "ForCausalLM")):
        return "CausalLM"
    match = re.search(r"For([A-Z]\w+)$", name)
    return match[1] if match else ""


def _labels(model: nn.Module) -> dict[int, str] | None:
    found = getattr(getattr(model, "config", None), "id2label", None)
    return {int(number): str(label) for number, label in found.items()} if isinstance(found, dict) else None


def _owner(place: Placed, own: str) -> Owner:
    common = own.startswith(f"{SHARED}.")
    return Owner(place.index, SHARED if common else place.site.key, own.removeprefix(f"{SHARED}."))


def fitting(adapter: Adapter, stored: StoredAdapter) -> dict[str, Tensor]:
    """The stored tensors under the names they have on this model, checked in both directions."""
    here: dict[Owner, tuple[str, Tensor]] = {}
    for place in adapter.placed:
        for own, tensor in place.graft.module.state_dict(keep_vars=True).items():
            here[_owner(place, own)] = (adapter.tensor_name(place, own), tensor)
    given = _with_shared({owner: tensor for owner, (_, tensor) in here.items()}, stored.owned())
    report = both_directions(_readable(here), _readable(given))
    if report:
        raise BadFile(f"adapter {stored.manifest.name!r} does not fit this model: tensors {report}")
    for owner, (name, tensor) in here.items():
        if given[owner].is_floating_point() != tensor.is_floating_point():
            raise BadFile(f"{name} is {given[owner].dtype} in the file, expected {tensor.dtype}")
    return {name: given[owner] for owner, (name, _) in here.items()}


def _with_shared(here: dict[Owner, Tensor], given: dict[Owner, Tensor]) -> dict[Owner, Tensor]:
    """What is given, and again for owners that share a tensor here (tied weights), stored once."""
    values: dict[int, Tensor] = {}
    for owner, tensor in here.items():
        if owner in given and not torch.equal(values.setdefault(id(tensor), given[owner]), given[owner]):
            raise BadFile(
                f"{owner.key}.{owner.name} shares its values with another tensor of this model (tied), "
                "but the file has two different ones. Untie the model's weights first"
            )
    shared = {owner: values[id(tensor)] for owner, tensor in here.items() if id(tensor) in values}
    return shared | given


def _readable(owned: dict[Owner, Tensor] | dict[Owner, tuple[str, Tensor]]) -> dict[str, Owner]:
    return {f"{owner.key}.{owner.name} (technique {owner.technique})": owner for owner in owned}


def refuse_merged(model: nn.Module, what: str) -> None:
    """StateError while an adapter is merged into the model."""
    seat = seat_of(model)
    merged = seat.state.merged if seat is not None and seat.root else ()
    if merged:
        raise StateError(f"{', '.join(merged)} is merged into the base; unmerge before {what}")


@contextmanager
def _all_or_nothing(model: nn.Module, name: str) -> Iterator[None]:
    """Take the new adapter off again, and put every set back, when the block fails."""
    known = adapters(model)

    def take_off() -> None:
        if name not in known and name in adapters(model):
            detach(model, name)

    with ExitStack() as undo:
        undo.enter_context(as_found(model, checks=True))
        undo.callback(take_off)
        yield
        undo.pop_all()
