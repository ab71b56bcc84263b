"""Everything graftwork raises on purpose.

GraftworkError
├── BadOption           a value out of range or of the wrong kind (also a ValueError)
├── UnknownName         a technique, workspace, adapter, tensor or key that does not exist (also a LookupError)
├── NothingMatches      a workspace or pattern that selects no module of this model
├── PortUnavailable     this model cannot host the technique at this port, with the reason
├── CardConflict        a card that contradicts its module, or an override the port cannot honour
├── NoGradient          a trainable adapter tensor that the first backward did not reach
├── NotMergeable        no change of weights can stand in for the adapter
├── NotComposable       adapters whose sum is not defined, or that differ in what a sum needs equal
├── RouteError          a route whose shape, range or names do not fit
├── StateError          the model is not in the state the verb needs (merged, detached, subclassed after attach)
├── BadFile             an adapter file that is corrupt, incomplete, unsafe or of another format
│   └── WrongBase       an adapter file made for another base model
├── BadData             a data set that cannot be read or does not fit the task
└── BadRecipe           a recipe with unknown keys or impossible values

Each text says what failed, where, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraftworkError(Exception):
    """Base class of all errors raised on purpose."""


class BadOption(GraftworkError, ValueError):
    """A value out of range or of the wrong kind."""


class UnknownName(GraftworkError, LookupError):
    """A name that does not exist; the text lists the nearest that do."""


class NothingMatches(GraftworkError):
    """A workspace or pattern that selects no module of this model."""


class PortUnavailable(GraftworkError):
    """This model cannot host the technique at this port."""


class CardConflict(GraftworkError):
    """A card that contradicts its module, or an override that the port cannot honour."""


class NoGradient(GraftworkError):
    """A trainable adapter tensor that the first backward did not reach."""


class NotMergeable(GraftworkError):
    """No change of weights can stand in for the adapter."""


class NotComposable(GraftworkError):
    """Adapters whose sum is not defined, or that differ in what a sum needs equal."""


class RouteError(GraftworkError):
    """A route whose shape, range or names do not fit the batch."""


class StateError(GraftworkError):
    """The model is not in the state that the verb needs."""


class BadFile(GraftworkError):
    """An adapter file that is corrupt, incomplete, unsafe or of another format."""


class WrongBase(BadFile):
    """An adapter file made for another base model."""


class BadData(GraftworkError):
    """A data set that cannot be read or does not fit the task."""


class BadRecipe(GraftworkError):
    """A recipe with unknown keys or impossible values."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that helps after a misspelt `name`: the nearest known names, or all of them."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {', '.join(close)}?"
    return f"Known: {', '.join(names)}." if names else "None exists."
