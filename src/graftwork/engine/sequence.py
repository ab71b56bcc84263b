"""Sequence port: extra positions, put in before a stack of layers and taken out behind it.

The module that runs the stack is wrapped, not the head: what a head, a loss or `generate` sees has the shapes
it always had. Deep prompts overwrite their slots at the input of each layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from torch import nn

from graftwork.engine import sequence_cache
from graftwork.engine.seat import Seat, seat_of
from graftwork.engine.sequence_facts import (
    Facts,
    check_embeds,
    decoder_site,
    facts_of,
    layer_paths,
    parameters,
    relative_bias,
    stack_path,
)
from graftwork.engine.sequence_layers import AtLayer, AtTable
from graftwork.engine.sequence_shift import shifts
from graftwork.engine.sequence_stack import AtStack
from graftwork.engine.swap import take_seat
from graftwork.errors import PortUnavailable
from graftwork.reference.properties import Port
from graftwork.reference.site import Site


def check(model: nn.Module, site: Site) -> None:
    """Refuse a stack that cannot take extra positions, with the reason."""
    check_embeds(facts_of(model, site), site, model.get_submodule(stack_path(model, site)))


def install(model: nn.Module, module: nn.Module, seat: Seat) -> None:
    """Make the stack of a newly seated prompt, and its layers, put its positions in and take them out."""
    site = next(graft.site for grafts in seat.at(Port.SEQUENCE).values() for graft in grafts)
    facts = facts_of(model, site)
    stack = _seat(model, stack_path(model, site), seat)
    layers = tuple(_seat(model, path, seat) for path in layer_paths(model, site))
    if facts.cache:
        sequence_cache.ready()
    around = stack.around if isinstance(stack.around, AtStack) else AtStack(facts)
    stack.around = replace(around, layers=layers)
    if facts.between or any(layer.at(Port.SEQUENCE) for layer in layers):
        _arrange_layers(model, facts, stack, layers)
    _arrange_table(model, facts, stack)
    if facts.stays:
        _arrange_decoder(model, site, stack)


def follow(model: nn.Module, seat: Seat) -> None:
    """Move the own positions of a stack behind a newly seated prefix that asks for it (`shift_positions`)."""
    site = next(graft.site for grafts in seat.at(Port.ATTENTION).values() for graft in grafts)
    if site.workspace != "attention" or not shifts(seat):
        return
    facts = facts_of(model, site)
    stack = _seat(model, stack_path(model, site), seat)
    around = stack.around if isinstance(stack.around, AtStack) else AtStack(facts)
    bias = relative_bias(model.get_submodule(stack.path))
    if not (facts.positions or facts.table or bias):
        raise PortUnavailable(f"{facts.where} counts no positions that could be moved behind a prefix")
    if seat not in around.prefixes:
        stack.around = replace(around, prefixes=(*around.prefixes, seat), bias=bias)
    _arrange_table(model, facts, stack)


def unfollow(model: nn.Module, seat: Seat) -> None:
    """Undo `follow` when no prefix at this attention module asks for it any more."""
    if not shifts(seat):
        _strike(model, seat, "prefixes")


def count(model: nn.Module, seat: Seat, site: Site) -> None:
    """Have the stack of a newly seated hidden module with a span tell which positions are which."""
    facts = facts_of(model, site)
    stack = _seat(model, stack_path(model, site), seat)
    around = stack.around if isinstance(stack.around, AtStack) else AtStack(facts)
    if seat not in around.counted:
        stack.around = replace(around, counted=(*around.counted, seat))


def uncount(model: nn.Module, seat: Seat) -> None:
    """Undo `count` when no module with a span is left at this site."""
    grafts = [graft for here in seat.at(Port.HIDDEN).values() for graft in here]
    if all(graft.module.span is None for graft in grafts):
        _strike(model, seat, "counted")


def uninstall(model: nn.Module, module: nn.Module, seat: Seat) -> None:
    """Undo `install` when no prompt is left at the stack that `seat` belongs to."""
    stack = seat.around.stack if isinstance(seat.around, AtLayer) else seat
    if not isinstance(stack.around, AtStack):
        return
    if stack.at(Port.SEQUENCE) or any(layer.at(Port.SEQUENCE) for layer in stack.around.layers):
        return
    stack.around = _needed(replace(stack.around, layers=()))
    for other in _seats(model):
        if isinstance(other.around, AtLayer) and other.around.stack is stack:
            other.around = None
        elif isinstance(other.around, AtStack) and other.around.encoder is stack:
            other.around = _needed(replace(other.around, encoder=None))


def _strike(model: nn.Module, seat: Seat, listed: Literal["prefixes", "counted"]) -> None:
    """Take a seat off a list that stacks keep; what is around a stack goes when nothing needs it any more."""
    for other in _seats(model):
        around = other.around
        if isinstance(around, AtStack) and seat in (seats := getattr(around, listed)):
            left: dict[str, Any] = {listed: tuple(one for one in seats if one is not seat)}
            other.around = _needed(replace(around, **left))


def _needed(around: AtStack) -> AtStack | None:
    wanted = around.layers or around.encoder is not None or around.prefixes or around.counted
    return around if wanted else None


def _seats(model: nn.Module) -> list[Seat]:
    return [seat for module in model.modules() if (seat := seat_of(module)) is not None]


def _arrange_table(model: nn.Module, facts: Facts, stack: Seat) -> None:
    """A table that counts by itself takes the positions that the stack tells it; without any it counts on."""
    if facts.table:
        path = f"{stack.path}.{facts.table}" if stack.path else facts.table
        _seat(model, path, stack).around = AtTable()


def _arrange_layers(model: nn.Module, facts: Facts, stack: Seat, layers: tuple[Seat, ...]) -> None:
    for number, layer in enumerate(layers):
        layer.around = AtLayer(
            arguments=parameters(model.get_submodule(layer.path)),
            stack=stack,
            between=facts.between,
            first=number == 0,
            last=number == len(layers) - 1,
            keep=facts.keep,
            front=facts.front,
            stays=facts.stays,
        )


def _arrange_decoder(model: nn.Module, site: Site, encoder: Seat) -> None:
    """The decoder that reads an encoder's output sees the prompts that stay in it."""
    there = decoder_site(model, site)
    decoder = _seat(model, stack_path(model, there), encoder)
    around = decoder.around if isinstance(decoder.around, AtStack) else AtStack(facts_of(model, there))
    decoder.around = replace(around, encoder=encoder)


def _seat(model: nn.Module, path: str, like: Seat) -> Seat:
    return take_seat(model.get_submodule(path), like.state, path)
