"""Attach and detach: resolve sites, build modules, then seat them; nothing is touched before all is known."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graftwork.anatomy.resolve import head_sites, select_sites
from graftwork.anatomy.walk import walk
from graftwork.engine import attention, offloaded, placing, recompute, sequence
from graftwork.engine.adapter import Adapter, Placed, prefixes
from graftwork.engine.calibration import with_statistics
from graftwork.engine.gates import gated
from graftwork.engine.meeting import meet, refuse_needed
from graftwork.engine.modules import HiddenModule, PrefixModule, PromptModule, WeightModule
from graftwork.engine.originals import Originals
from graftwork.engine.seat import SEAT, Graft, seat_of, stored_parameter
from graftwork.engine.state import State
from graftwork.engine.swap import check_leavable, leave_seat, no_inference, take_seat
from graftwork.errors import (
    BadOption,
    CardConflict,
    NothingMatches,
    PortUnavailable,
    StateError,
    UnknownName,
    nearest,
)
from graftwork.reference.catalogue import make
from graftwork.reference.properties import Insertion, Port
from graftwork.reference.site import Kind, Site
from graftwork.reference.technique import Technique

_CONTRACTS: dict[Port, type[nn.Module]] = {
    Port.WEIGHT: WeightModule,
    Port.HIDDEN: HiddenModule,
    Port.ATTENTION: PrefixModule,
    Port.SEQUENCE: PromptModule,
}
_WRAPPERS = {
    "DistributedDataParallel": "wrap the model in DistributedDataParallel after attach",
    "FullyShardedDataParallel": "wrap the model in FSDP after attach",
    "FSDPModule": "call fully_shard after attach",
    "OptimizedModule": "attach first and compile then (or attach to the model below, `model._orig_mod`)",
}


@no_inference
def attach(
    model: nn.Module,
    technique: Technique | Sequence[Technique],
    *,
    name: str = "default",
    head: Literal["auto"] | bool = "auto",
    verify: bool = True,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    originals: nn.Module | Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Graft a technique (or several, as one adapter) onto a model; the base is frozen, its keys stay.

    The new adapter becomes the active one and the one that trains; others stay attached, inactive and frozen.

    Args:
        model: any `nn.Module`; it stays the caller's object.
        technique: what to graft, `LoRA(rank=8)`.
        name: letters, digits, `_` and `-`.
        head: train a copy of the task head with the adapter ("auto": when the model has a task head; True: it
            must have one; False: the head stays frozen).
        verify: check in the first forward that the host comes by every site, and in the first backward that
            every trainable tensor gets a gradient.
        calibration: batches, each a mapping of the model's own arguments, for techniques that start from data. They
            run through the bare model in eval mode, once each; with labels where gradients are read. All processes
            of a run must be given the same.
        originals: the model as it was before quantisation, or its state dict, for techniques that start from what
            was lost.

    Returns:
        The adapter, with its sites, modules and tensors.

    Raises:
        NothingMatches: a workspace selects no module. PortUnavailable: the model cannot host the technique.
        BadOption: calibration data that are missing, not needed, or do not reach a site; originals likewise.
        CardConflict: an override the port cannot honour. StateError: the model is wrapped, merged or attached
            elsewhere.
    """
    techniques = (technique,) if isinstance(technique, Technique) else tuple(technique)
    state = _state_for(model, name)
    before = None if originals is None else Originals(originals)
    wanted = [(i, t, site) for i, t in enumerate(techniques) for site in _sites(model, t, before)]
    wanted = with_statistics(model, state, wanted, calibration)
    techniques, wanted = _resolved(techniques, wanted)
    techniques, wanted = _with_head(model, techniques, wanted, head)
    built = _build(model, techniques, wanted, name)
    meet(state, techniques, built)
    if before is not None and not before.used:
        raise BadOption("originals= is given, but nothing starts from them: leave them out")
    adapter = Adapter(name, techniques, built, _size(model))
    _seat(model, state, adapter)
    state.verify = state.unreached = state.ungraded = verify
    return adapter


def detach(model: nn.Module, *names: str) -> None:
    """Take adapters off (all of them when none is named); the last one leaves the model exactly as it was."""
    state = _root_state(model)
    going = names or tuple(state.adapters)
    for name in going:
        require(state, name)
    refuse_needed(state.adapters.values(), going)
    if state.merged:
        raise StateError(f"{', '.join(state.merged)} is merged into the base; unmerge before detach")
    if set(going) == set(state.adapters):
        _strip(model, state)
        return
    for name in going:
        placing.remove(model, state, state.adapters[name])
        state.adapters = {key: value for key, value in state.adapters.items() if key != name}
    state.facts.forget()
    state.active = tuple(name for name in state.active if name in state.adapters)
    state.training = tuple(name for name in state.training if name in state.adapters)
    if set(going) & set(state.running):
        state.route = state.chosen = None


def state_of(model: nn.Module) -> State:
    """The state of an attached model whose sites are all there; an error with what to do on any other."""
    state = _root_state(model)
    state.facts.check(model, SEAT, state.adapters.values())
    return state


def _root_state(model: nn.Module) -> State:
    seat = seat_of(model)
    if seat is None or not seat.root:
        raise StateError(
            f"nothing is attached to this {type(model).__name__}; call graftwork.attach on it first"
        )
    return seat.state


def require(state: State, name: str) -> Adapter:
    """The adapter of that name."""
    if name not in state.adapters:
        raise UnknownName(f"no adapter is called {name!r}. {nearest(name, state.adapters)}")
    return state.adapters[name]


def _state_for(model: nn.Module, name: str) -> State:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
        raise BadOption(f"an adapter's name has letters, digits, '_' and '-', not {name!r}")
    if hasattr(nn.ModuleDict(), name):
        raise BadOption(f"{name!r} is a word of torch modules and cannot name an adapter")
    for kind in type(model).__mro__:
        if kind.__name__ in _WRAPPERS:
            raise StateError(f"the model is wrapped in {kind.__name__}: {_WRAPPERS[kind.__name__]}")
    for path, module in walk(model):
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            raise StateError(f"{path} is sharded already: {_WRAPPERS['FSDPModule']}")
    seat = seat_of(model)
    if seat is None:
        return State()
    if not seat.root:
        raise StateError("this module is part of an attached model; attach to that model instead")
    if name in seat.state.adapters:
        raise StateError(f"an adapter called {name!r} is attached already; detach it or choose another name")
    return state_of(model)


def _sites(model: nn.Module, technique: Technique, before: Originals | None) -> list[Site]:
    card = technique.card
    found = select_sites(model, card.workspaces, technique.layers, port=card.port)
    sites = [site for site in (_with_host(model, site, before) for site in found) if technique.fits(site)]
    if not sites:
        raise NothingMatches(
            f"{technique.name}: none of the {len(found)} sites at {', '.join(card.workspaces)} fits "
            f"({', '.join(sorted({site.key for site in found})[:4])}, ...). Choose other workspaces"
        )
    if len(sites) < len(found):
        _refuse_idle_entries(model, technique, {site.key for site in sites})
    for site in sites:
        _check(model, technique, site)
    return sites


def _refuse_idle_entries(model: nn.Module, technique: Technique, fitting: set[str]) -> None:
    """Each entry asked for must bring something, not only all of them together."""
    card = technique.card
    for text in technique.workspaces or ():
        meant = select_sites(model, (text,), technique.layers, port=card.port)
        if meant and not text.endswith("?") and not fitting & {site.key for site in meant}:
            raise NothingMatches(
                f"{technique.name}: {text!r} is there ({', '.join(site.key for site in meant[:4])}), but "
                "none of it fits "
                f"a {technique.name} module, so it would be left out. Take it out of workspaces"
            )


def _check(model: nn.Module, technique: Technique, site: Site) -> None:
    port = technique.card.port
    module = model.get_submodule(site.module)
    if port is Port.HIDDEN and site.read_only:
        raise PortUnavailable(
            f"{technique.name}: {site.key} ({site.module}) is read by its owner and never called, so a "
            "hidden module there would do nothing; use a weight-port technique, or the block's output"
        )
    parallel = port is Port.HIDDEN and technique.card.insertion is Insertion.PARALLEL
    if parallel and set(getattr(module, "stride", (1,))) != {1}:
        raise PortUnavailable(
            f"{technique.name}: {site.key} ({site.module}) has a stride of {module.stride}, so a parallel "
            "module that reads its input has no position for each of its outputs; use insertion='sequential'"
        )
    if port is Port.ATTENTION:
        attention.check(module, site)
    if port is Port.SEQUENCE:
        sequence.check(model, site)


def _with_host(model: nn.Module, site: Site, before: Originals | None = None) -> Site:
    """The site with access to the host's weight and bias, now and before, for techniques that start from them."""
    offloaded.refuse_whole(model, site.module)
    site = replace(site, device=offloaded.device_of(model, site.module, site.device))
    if site.kind in (Kind.BLOCK, Kind.ATTENTION, Kind.STACK):
        return replace(site, matrix=placing.embedding_matrix(model, site))
    original = None if before is None else before.reader(site)
    return replace(
        site, matrix=placing.matrix(model, site), bias=placing.bias(model, site), original=original
    )


def _resolved(
    techniques: tuple[Technique, ...], wanted: list[tuple[int, Technique, Site]]
) -> tuple[tuple[Technique, ...], list[tuple[int, Technique, Site]]]:
    """The techniques once their sites and statistics are known, and the sites they keep."""
    found = tuple(t.resolved([site for i, _, site in wanted if i == n]) for n, t in enumerate(techniques))
    return found, [(i, found[i], site) for i, _, site in wanted if not found[i].omits(site)]


def _with_head(
    model: nn.Module,
    techniques: tuple[Technique, ...],
    wanted: list[tuple[int, Technique, Site]],
    head: Literal["auto"] | bool,
) -> tuple[tuple[Technique, ...], list[tuple[int, Technique, Site]]]:
    if head is False:
        return techniques, wanted
    taken = {site.module for _, _, site in wanted}
    sites = [_with_host(model, site) for site in head_sites(model) if site.module not in taken]
    if not sites:
        if head is True and not head_sites(model):
            raise NothingMatches(f"head=True, but {type(model).__name__} has no task head to train")
        return techniques, wanted
    tuning = make("fine-tuning", {"workspaces": ["head"]})
    return (*techniques, tuning), [*wanted, *((len(techniques), tuning, site) for site in sites)]


def _size(model: nn.Module) -> int:
    own = {
        id(p): p.numel() for _, module in walk(model) for p in module._parameters.values() if p is not None
    }
    return sum(own.values())


def _build(
    model: nn.Module, techniques: tuple[Technique, ...], wanted: list[tuple[int, Technique, Site]], name: str
) -> tuple[Placed, ...]:
    by_technique = [[site for i, _, site in wanted if i == number] for number in range(len(techniques))]
    shared = [_shared(t, sites) for t, sites in zip(techniques, by_technique, strict=True)]
    names = prefixes([(technique.name, site.key) for _, technique, site in wanted])
    placed = []
    for (index, technique, site), prefix in zip(wanted, names, strict=True):
        module = _module(technique, site, shared[index])
        lean = replace(site, matrix=None, bias=None, original=None, statistic=None)
        graft = Graft(name, technique.name, lean, technique.card, module)
        placed.append(Placed(index, lean, technique.card.port, graft, prefix))
    _tie(model, techniques, placed)
    return tuple(placed)


def _tie(model: nn.Module, techniques: tuple[Technique, ...], placed: list[Placed]) -> None:
    """Tell a technique where two of its weight-port sites stand for one tensor of the host."""
    first: dict[tuple[int, int], Placed] = {}
    for place in placed:
        host = stored_parameter(model.get_submodule(place.site.module), place.site.parameter)
        if place.port is Port.WEIGHT and host is not None and place.site.channels is None:
            known = first.setdefault((place.index, id(host)), place)
            if known is not place:
                techniques[place.index].tie(known.graft.module, place.graft.module)


def _shared(technique: Technique, sites: list[Site]) -> nn.Module | None:
    with torch.device(sites[0].device):
        return technique.shared(sites)


def _module(technique: Technique, site: Site, shared: nn.Module | None) -> nn.Module:
    with torch.device(site.device):
        module = gated(technique, site, technique.build(site))
    contract = _CONTRACTS[technique.card.port]
    if not isinstance(module, contract):
        raise CardConflict(
            f"{technique.name}: its card works at the {technique.card.port.value} port, whose modules are "
            f"{contract.__name__}s, but build() made a {type(module).__name__}"
        )
    if shared is not None:
        module.adopt(shared)  # type: ignore[operator]
    return module.double() if site.dtype == torch.float64 else module


def _seat(model: nn.Module, state: State, adapter: Adapter) -> None:
    first = not state.adapters
    if first:
        state.frozen = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    try:
        root = take_seat(model, state, "")
        root.root = True
        if first:
            for path, module in model.named_modules():
                if recompute.checkpoints(module):
                    take_seat(module, state, path)
        for place in adapter.placed:
            placing.put(model, state, place)
    except Exception:
        placing.remove(model, state, adapter)
        if first:
            _strip(model, state)
        raise
    if first:
        _freeze_base(model)
    for other in state.training:
        for parameter in state.adapters[other].parameters():
            parameter.requires_grad_(False)
    state.training = (adapter.name,)
    state.facts.gather(model, SEAT, [adapter])
    state.adapters = {**state.adapters, adapter.name: adapter}
    state.active = (adapter.name,)


def _freeze_base(model: nn.Module) -> None:
    for key, parameter in model.named_parameters():
        if not placing.is_adapter_name(key):
            parameter.requires_grad_(False)


def _strip(model: nn.Module, state: State) -> None:
    """Take every trace of graftwork off a model."""
    paths = sorted(state.seated, key=lambda path: path.count("."), reverse=True)
    present = [(path, placing.submodule(model, path)) for path in paths]
    for path, module in present:
        if module is not None and seat_of(module) is not None:
            check_leavable(module, path)
    for adapter in state.adapters.values():
        placing.remove(model, state, adapter)
    for path, module in present:
        if module is not None:
            leave_seat(module, path)
    for key, parameter in model.named_parameters():
        if key in state.frozen:
            parameter.requires_grad_(state.frozen[key])
    state.adapters, state.active, state.training, state.route, state.chosen = {}, (), (), None, None
