"""From a model and workspace names to sites: pure functions of the model, nothing is kept between calls."""

from __future__ import annotations

from torch import nn

from graftwork.anatomy.anatomy import Anatomy, Stack
from graftwork.anatomy.bare import with_bare
from graftwork.anatomy.discovery import discover
from graftwork.anatomy.layers import Layers
from graftwork.anatomy.owners import head_places, known_anatomy, merged, owners, stranger
from graftwork.anatomy.patterns import parse, select
from graftwork.anatomy.sites import BLOCKS, block_sites, sites_at
from graftwork.anatomy.survey import Survey, survey
from graftwork.errors import NothingMatches, PortUnavailable
from graftwork.reference.properties import Port
from graftwork.reference.site import Site


def anatomy_of(model: nn.Module) -> Anatomy:
    """The anatomy of a model, with paths from its root.

    Submodels of known families (by `config.model_type`) get their family's table, heads around them follow
    from the class of the model, and everything else is discovered.
    """
    return _surveyed(model)[0]


def all_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every workspace of the model: its weights first, then blocks, layers and inner activations."""
    found = _surveyed(model)[1]
    return (*sites_at(found, Port.WEIGHT), *block_sites(found))


def select_sites(
    model: nn.Module, workspaces: tuple[str, ...], layers: Layers = "all", port: Port = Port.WEIGHT
) -> tuple[Site, ...]:
    """The sites that workspace names mean at a port.

    Args:
        model: any model; it is only read.
        workspaces: entries as `graftwork.anatomy.patterns` describes them.
        layers: which layers of each stack; a place outside layers goes with "all" or when named itself.
        port: at the weight port a site is a module with a weight; at the hidden port an activation (a
            block's last module, with its first as `entry`); at the attention port an attention module; at
            the sequence port a stack (`embedding`, with the first layer as `entry` where positions are
            put in at the layers) or, for deep prompts, a layer (`layer`).

    Raises:
        NothingMatches: an entry without `?` selects nothing. PortUnavailable: the model refuses the port.
        BadOption: an unreadable entry or a layer out of range.
    """
    anatomy, found = _surveyed(model)
    sites = _open(sites_at(found, port), anatomy, port)
    if not sites:
        raise PortUnavailable(_refusal(model, anatomy, found, port))
    try:
        return tuple(select(sites, workspaces, layers))
    except NothingMatches as error:
        raise NothingMatches(f"{type(model).__name__}: {error}{_hint(workspaces, port)}") from None


def head_sites(model: nn.Module) -> tuple[Site, ...]:
    """The layers of a task head (classifier, span, regression), to be trained afresh with an adapter.

    Empty for a bare model and for language models: a projection to the vocabulary is never a task head.
    """
    found = _surveyed(model)[1]
    return tuple(site for site in sites_at(found, Port.WEIGHT) if site.workspace == "head")


def stack_of(model: nn.Module, site: Site) -> Stack:
    """The stack of a site (`sequence_start`, `causal`, ...), with paths from the model's root."""
    return next(stack for stack in anatomy_of(model).stacks if stack.name == site.stack)


def layer_modules(model: nn.Module, site: Site) -> tuple[str, ...]:
    """Dotted names of all layers of the stack that a site belongs to, in order."""
    runs = _surveyed(model)[1].runs
    return tuple(layer.path for run in runs if run.stack.name == site.stack for layer in run.layers)


def _surveyed(model: nn.Module) -> tuple[Anatomy, Survey]:
    """The anatomy and what it finds: known families, then heads around them, then whatever is left."""
    found = owners(model)
    known = known_anatomy(found)
    first = survey(model, known)
    taken = _modules(first) | {id(model.get_submodule(path)) for path in known.unused if _has(model, path)}
    heads = Anatomy(families=(), stacks=(), places=head_places(found or stranger(model), taken))
    second = survey(model, heads)
    rest = discover(model, taken | _modules(second), others=bool(known.stacks))
    third = survey(model, rest)
    places = (*first.places, *second.places, *third.places)
    whole, met = merged([known, heads, rest]), Survey(runs=(*first.runs, *third.runs), places=places)
    everything = with_bare(model, whole, met)
    return everything, met if everything == whole else survey(model, everything)


def _modules(found: Survey) -> set[int]:
    return {id(spot.module) for spot in found.spots()}


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _open(sites: list[Site], anatomy: Anatomy, port: Port) -> list[Site]:
    """At the attention port, the sites of stacks that do not refuse it."""
    if port is not Port.ATTENTION:
        return sites
    refused = {stack.name for stack in anatomy.stacks if stack.attention_reason}
    return [site for site in sites if site.stack not in refused]


def _refusal(model: nn.Module, anatomy: Anatomy, found: Survey, port: Port) -> str:
    reasons = {
        Port.ATTENTION: [s.attention_reason for s in anatomy.stacks],
        Port.SEQUENCE: [s.sequence_reason for s in anatomy.stacks],
    }.get(port, [])
    reason = next((text for text in reasons if text), "no module there that techniques know how to treat")
    here = sorted({site.workspace for site in sites_at(found, Port.WEIGHT)})
    return (
        f"{port.value} port: {type(model).__name__}: {reason}. Its workspaces at the other ports: "
        f"{', '.join(here) or 'none'}"
    )


def _hint(workspaces: tuple[str, ...], port: Port) -> str:
    blocks = {*BLOCKS, "layer", "feedforward.activation"}
    named = sorted({name for text in workspaces for name in parse(text).alternatives} & blocks)
    if port is Port.WEIGHT and named:
        return f". {', '.join(named)} has no weight of its own: name its projections (`attention.*`)"
    return ""
