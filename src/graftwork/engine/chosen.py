"""A route decided anew in each forward of the model, from what the model is called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from graftwork.engine.blend import Blend
from graftwork.engine.route import Route
from graftwork.engine.state import Snapshot, State
from graftwork.errors import RouteError

Router = Callable[[nn.Module, Mapping[str, Any]], Tensor]


class Chosen:
    """Names, and a router that gives the index (integers) or the weights (floating point) of a forward.

    Args:
        names: adapters that the router chooses from.
        router: called with the model and its arguments by name. While it runs, no adapter does: it may call
            the model for the base's features.
    """

    def __init__(self, names: Sequence[str], router: Router) -> None:
        self.names = tuple(names)
        self.router = router

    def of_call(
        self, model: nn.Module, state: State, base: type, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Route | Blend:
        """The route of one forward of the model."""
        called = inspect.signature(base.forward)  # type: ignore[attr-defined]
        names = list(called.parameters)[1:]
        given = called.bind_partial(model, *args, **kwargs).arguments
        named = {name: given[name] for name in names if name in given}
        for name in names:
            if called.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                named |= named.pop(name, {})
        with state.turn(Snapshot((), None)):
            answer = self.router(model, named)
        if not isinstance(answer, Tensor):
            raise RouteError(f"the router answers {type(answer).__name__}; an index or weights are a tensor")
        return Blend(self.names, answer) if answer.is_floating_point() else Route(self.names, answer)

    def __deepcopy__(self, memo: dict[int, object]) -> Chosen:
        return self
