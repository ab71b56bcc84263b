"""Modules that meet those of other adapters: to read them, to share a tensor with them, to start from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from graftwork.engine.adapter import Adapter, Placed
from graftwork.engine.seat import Graft
from graftwork.engine.state import State
from graftwork.errors import NothingMatches, StateError, nearest
from graftwork.reference.technique import Technique


def meet(state: State, techniques: Sequence[Technique], placed: Iterable[Placed]) -> None:
    """Hand each module of a technique that names other adapters their grafts at its site.

    Raises:
        NothingMatches: an adapter of that name is not attached, or has nothing at a site.
    """
    for place in placed:
        technique = techniques[place.index]
        names = technique.others()
        if names:
            place.graft.module.meet({name: _there(state, technique, name, place) for name in names})  # type: ignore[operator]


def _there(state: State, technique: Technique, name: str, place: Placed) -> tuple[Graft, ...]:
    if name not in state.adapters:
        raise NothingMatches(
            f"{technique.name}: no adapter called {name!r} is attached. {nearest(name, state.adapters)} Attach or "
            f"load it first; {technique.name} needs {', '.join(map(repr, technique.others()))}"
        )
    other = state.adapters[name]
    key, port = place.site.key, place.port
    found = tuple(each.graft for each in other.placed if (each.site.key, each.port) == (key, port))
    if not found:
        raise NothingMatches(
            f"{technique.name}: adapter {name!r} has no {port.value}-port module at {key}; it has some at "
            f"{', '.join(list(other.sites)[:4])}. Choose workspaces and layers that both have"
        )
    return found


def refuse_needed(adapters: Iterable[Adapter], going: Sequence[str]) -> None:
    """Keep adapters that a staying one reads."""
    for adapter in adapters:
        read = {name for technique in adapter.techniques for name in technique.stored().others()}
        needed = [name for name in going if name in read]
        if needed and adapter.name not in going:
            raise StateError(
                f"adapter {adapter.name!r} reads {', '.join(map(repr, needed))}; detach it first, or together"
            )
