"""Sites can vanish: resizing replaces a head, a user replaces a layer. What must still hold is checked.

Each fact is one dictionary entry of the model: this child is still the module that was grafted, this table
still has its rows. A check costs about 60 ns a fact, so every forward and every verb can afford it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from graftwork.engine import offloaded
from graftwork.errors import StateError

if TYPE_CHECKING:
    from graftwork.engine.adapter import Adapter

_ROWS = "num_embeddings"
Fact = tuple[dict[str, Any], str, Any, str]  # entries of the model, key, value, path of the site


class Facts:
    """What must hold of one model. A copy of the model gathers its own on first use."""

    def __init__(self) -> None:
        self._facts: list[Fact] = []
        self._entries: list[tuple[dict[str, Any], str]] = []
        self._values: list[Any] = []
        self._known: set[Hashable] = set()

    def __reduce__(self) -> tuple[type[Facts], tuple[()]]:
        return Facts, ()

    def forget(self) -> None:
        """Gather afresh at the next check."""
        self.__init__()  # type: ignore[misc]

    def gather(self, model: nn.Module, seat_name: str, adapters: Iterable[Adapter]) -> None:
        """Note how the sites of `adapters` are reached now, once a site however many adapters it has."""
        for adapter in adapters:
            for place in adapter.placed:
                if place.site.module in self._known:
                    continue
                self._known.add(place.site.module)
                self._facts += self._of(model, seat_name, place.site.module)
                held = place.graft.module.__dict__  # offloading takes all modules of a site or none
                self._facts.append((held, offloaded.HOOK, held.get(offloaded.HOOK), place.site.module))
        self._entries = [(entries, key) for entries, key, _, _ in self._facts]
        self._values = [value for _, _, value, _ in self._facts]

    def check(self, model: nn.Module, seat_name: str, adapters: Iterable[Adapter]) -> None:
        """Raise StateError when a site is no longer what was grafted."""
        if not self._facts:
            self.gather(model, seat_name, adapters)
        if [entries.get(key) for entries, key in self._entries] != self._values:
            self._tell(model, seat_name, adapters)

    def _tell(self, model: nn.Module, seat_name: str, adapters: Iterable[Adapter]) -> None:
        changed = [fact for fact in self._facts if fact[0].get(fact[1]) != fact[2]]
        hooked = [fact for fact in changed if fact[1] == offloaded.HOOK]
        if any(offloaded.offloading(entries.get(key)) for entries, key, _, _ in hooked):
            raise StateError(
                "the model was offloaded after attach, adapter tensors with it. Offload (dispatch_model, "
                "cpu_offload, device_map) first, then attach"
            )
        if len(changed) > len(hooked):
            raise _changed(fact for fact in changed if fact not in hooked)
        self.forget()
        self.gather(model, seat_name, adapters)

    def _of(self, model: nn.Module, seat_name: str, path: str) -> list[Fact]:
        facts: list[Fact] = []
        module = model
        for part in path.split(".") if path else ():
            child = module._modules.get(part)
            link = (module._modules, part, child, path)
            if child is None:
                raise _changed([link])
            if (id(module), part) not in self._known:  # a link that several sites share is one fact
                self._known.add((id(module), part))
                facts.append(link)
            module = child
        held = module.__dict__
        if seat_name not in held:
            raise _changed([(held, seat_name, None, path)])
        return [*facts, (held, _ROWS, held[_ROWS], path)] if _ROWS in held else facts


def _changed(facts: Iterable[Fact]) -> StateError:
    lines = [
        f"{path} ({key} was {before}, is {entries.get(key)})" if isinstance(before, int) else path
        for entries, key, before, path in facts
    ]
    more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
    return StateError(
        f"no longer the modules that were grafted: {', '.join(lines[:4])}{more}. They were replaced, "
        "removed or resized, so their adapter tensors would be lost or not fit. Detach, change the base "
        "(resize_token_embeddings and the like), then attach"
    )
