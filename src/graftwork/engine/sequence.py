"""Sequence port: extra positions, put in before a stack of layers and taken out behind it.

The module that runs the stack is wrapped, not the head: what a head, a loss or `generate` sees has the shapes
it always had. Deep prompts overwrite their slots at the input of each layer.
"""

from __future__ import annotations

from dataclasses import replace

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
    stack_path,
)
from graftwork.engine.sequence_layers import AtLayer, AtTable
from graftwork.engine.sequence_stack import AtStack
from graftwork.engine.swap import take_seat
from graftwork.reference.properties import Port
from graftwork.reference.site import Site


def check(model: nn.Module, site: Site) -> None:
    """Refuse a stack that cannot take extra positions, with the reason."""
    check_embeds(facts_of(model, site), site)


def install(model: nn.Module, module: nn.Module, seat: Seat) -> None:
    """Make the stack of a newly seated prompt, and its layers, put its positions in and take them out."""
    site = next(graft.site for grafts in seat.at(Port.SEQUENCE).values() for graft in grafts)
    facts = facts_of(model, site)
    stack = _seat(model, stack_path(model, site), seat)
    layers = tuple(_seat(model, path, seat) for path in layer_paths(model, site))
    if facts.cache:
        sequence_cache.ready()
    around = stack.around if isinstance(stack.around, AtStack) else None
    stack.around = AtStack(facts, layers, around.encoder if around else None)
    if facts.between or any(layer.at(Port.SEQUENCE) for layer in layers):
        _arrange_layers(model, facts, stack, layers)
    if facts.table:
        path = f"{stack.path}.{facts.table}" if stack.path else facts.table
        _seat(model, path, seat).around = AtTable(stack)
    if facts.stays:
        _arrange_decoder(model, site, stack)


def uninstall(model: nn.Module, module: nn.Module, seat: Seat) -> None:
    """Undo `install` when no prompt is left at the stack that `seat` belongs to."""
    around = seat.around
    stack = around.stack if isinstance(around, AtLayer) else seat
    if not isinstance(stack.around, AtStack):
        return
    if stack.at(Port.SEQUENCE) or any(layer.at(Port.SEQUENCE) for layer in stack.around.layers):
        return
    for path in seat.state.seated:
        other = seat_of(model.get_submodule(path))
        if other is None:
            continue
        if isinstance(other.around, AtLayer | AtTable) and other.around.stack is stack:
            other.around = None
        elif isinstance(other.around, AtStack) and other.around.encoder is stack:
            own = replace(other.around, encoder=None)
            other.around = own if own.layers else None
    stack.around = None if stack.around.encoder is None else replace(stack.around, layers=())


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
    if isinstance(decoder.around, AtStack):
        decoder.around = replace(decoder.around, encoder=encoder)
    else:
        decoder.around = AtStack(facts_of(model, there), (), encoder)


def _seat(model: nn.Module, path: str, like: Seat) -> Seat:
    return take_seat(model.get_submodule(path), like.state, path)
