"""Workspace entries, as a card or a user writes them, matched against the sites of a model.

    attention.query            everywhere it exists
    decoder.attention.query    in one stack
    attention.*                everything below attention; `*` everything
    all-linear                 a preset
    a|b                        the first that this model has
    a?                         nothing, where the model lacks it
    re:PATTERN                 module names, whole, by regular expression

Where a pattern or preset would take a fused projection both whole and in parts, it takes the whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from graftwork.anatomy.layers import Layers, chosen_layers
from graftwork.errors import BadOption, NothingMatches, nearest
from graftwork.reference.site import Site
from graftwork.reference.workspaces import PRESETS


@dataclass(frozen=True)
class Entry:
    """One entry: alternatives, of which the first that matches counts."""

    text: str
    alternatives: tuple[str, ...]
    optional: bool


def parse(text: str) -> Entry:
    """An entry from its text; BadOption on an empty name or an invalid regular expression."""
    if text.startswith("re:"):
        _compiled(text[3:])
        return Entry(text, (text,), False)
    names = [name.strip() for name in text.split("|")]
    optional = any(name.endswith("?") for name in names)
    names = [name.removesuffix("?") for name in names]
    if not all(names):
        raise BadOption(f"workspace entry {text!r} has an empty name")
    return Entry(text, tuple(names), optional)


def select(sites: Sequence[Site], entries: Sequence[str], layers: Layers) -> list[Site]:
    """The sites that the entries mean, in model order, each once."""
    if isinstance(entries, str):
        raise BadOption(f"workspaces={entries!r} must be a list of names, [{entries!r}]")
    taken: dict[int, Site] = {}
    for text in entries:
        for number, site in _matches(sites, parse(text), layers):
            taken.setdefault(number, site)
    return [taken[number] for number in sorted(taken)]


def _matches(sites: Sequence[Site], entry: Entry, layers: Layers) -> list[tuple[int, Site]]:
    for name in entry.alternatives:
        found = _named(sites, name)
        if found:
            kept = _in_layers(found, layers, broad=_is_broad(name))
            if not kept and not entry.optional:
                here = sorted({site.layer for _, site in found if site.layer is not None})
                raise NothingMatches(
                    f"{name!r} exists in layers {here} only, none of which is in layers={layers!r}"
                )
            return kept
    if entry.optional:
        return []
    raise NothingMatches(_nothing(sites, entry))


def _named(sites: Sequence[Site], name: str) -> list[tuple[int, Site]]:
    numbered = list(enumerate(sites))
    if name.startswith("re:"):
        pattern = _compiled(name[3:])
        whole = [(n, s) for n, s in numbered if s.channels is None and pattern.fullmatch(s.module)]
        once = {(s.module, s.parameter): (n, replace(s, key=_path_key(s))) for n, s in reversed(whole)}
        return sorted(once.values(), key=lambda hit: hit[0])
    if not _is_broad(name):
        return [(n, s) for n, s in numbered if _is(s, name)]
    names = PRESETS.get(name, (name,))
    found = [(n, s) for n, s in numbered if any(_is(s, one) for one in names)]
    wholes = {(s.module, s.parameter) for _, s in found if s.channels is None}
    return [(n, s) for n, s in found if s.channels is None or (s.module, s.parameter) not in wholes]


def _path_key(site: Site) -> str:
    return site.module if site.parameter == "weight" else f"{site.module}.{site.parameter}"


def _is(site: Site, name: str) -> bool:
    if site.stack and name.startswith(f"{site.stack}."):
        inside = name[len(site.stack) + 1 :]
        if _is_workspace(site.workspace, inside):
            return True
    return _is_workspace(site.workspace, name)


def _is_workspace(workspace: str, name: str) -> bool:
    if name == "*":
        return True
    if name.endswith(".*"):
        return workspace.startswith(name[:-1])
    return workspace == name


def _is_broad(name: str) -> bool:
    return name in PRESETS or name.endswith("*") or name.startswith("re:")


def _in_layers(found: list[tuple[int, Site]], layers: Layers, broad: bool) -> list[tuple[int, Site]]:
    """Sites in the chosen layers. A place outside layers goes with "all", or with its own name always."""
    if layers == "all":
        return found
    wanted = {s.stack: chosen_layers(layers, s.layers) for _, s in found if s.layer is not None}
    return [(n, s) for n, s in found if (not broad if s.layer is None else s.layer in wanted[s.stack])]


def _nothing(sites: Sequence[Site], entry: Entry) -> str:
    if entry.text.startswith("re:"):
        modules = sorted({site.module for site in sites})
        shown = ", ".join(modules[:6])
        return f"no module name matches {entry.text!r} as a whole. There are {shown}, ... ({len(modules)})"
    here = sorted({site.workspace for site in sites})
    stacks = sorted({site.stack for site in sites if site.stack})
    wanted = " or ".join(repr(name) for name in entry.alternatives)
    note = f" (in front of each may stand {' or '.join(f'{s}.' for s in stacks)})" if stacks else ""
    known = {*here, *(f"{s}.{w}" for s in stacks for w in here), *PRESETS}
    close = nearest(entry.alternatives[0], known) if here else ""
    close = f" {close}" if close.startswith("Did") else ""
    return (
        f"this model has no workspace {wanted} at this port.{close} It has: {', '.join(here) or 'none'}{note}"
    )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise BadOption(f"{pattern!r} is not a regular expression: {error}") from None
