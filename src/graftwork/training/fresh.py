"""Parts of a base that its files do not hold: they start at random, so they must be trained and saved.

A task head goes with the adapter anyway. Anything else that is new with this task (a pooler that the files
lack, the transform before a vocabulary) would be another one at each loading; it becomes part of the adapter.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from torch import Tensor, nn

from graftwork.anatomy.resolve import head_sites, select_sites
from graftwork.errors import NothingMatches, PortUnavailable
from graftwork.models.base import fresh_parameters
from graftwork.reference.catalogue import make
from graftwork.reference.technique import Technique

log = logging.getLogger(__name__)


def with_fresh(model: nn.Module, techniques: Sequence[Technique]) -> list[Technique]:
    """`techniques`, and fine-tuning of what is random in `model` and trained neither by them nor as its head.

    Raises PortUnavailable when such a part cannot be trained as an adapter.
    """
    new = new_parts(model, techniques)
    if not new:
        return list(techniques)
    patterns = [f"re:{re.escape(name)}" for name in new]
    added = make("fine-tuning", {"workspaces": patterns})
    try:
        select_sites(model, tuple(patterns))
    except NothingMatches as error:
        raise PortUnavailable(
            f"the base's files lack {', '.join(new)}, which would start at random and cannot be trained with "
            f"the adapter; take a base that has it, or another task ({error})"
        ) from None
    log.warning("not in the base's files, so trained and saved with the adapter: %s", ", ".join(new))
    return [*techniques, added]


def new_parts(model: nn.Module, techniques: Sequence[Technique] = ()) -> list[str]:
    """Modules that are random in `model` and trained neither by `techniques` nor as its head."""
    return sorted(_random_modules(model) - _trained_modules(model, techniques))


def _random_modules(model: nn.Module) -> set[str]:
    parameters = dict(model.named_parameters())
    names = [
        name for name in fresh_parameters(model) if name in parameters and not _constant(parameters[name])
    ]
    return {name.rpartition(".")[0] for name in names}


def _trained_modules(model: nn.Module, techniques: Sequence[Technique]) -> set[str]:
    own = [t for t in techniques if t.name == "fine-tuning"]
    chosen = [site for t in own for site in select_sites(model, t.card.workspaces, t.layers)]
    return {site.module for site in (*chosen, *head_sites(model))}


def _constant(tensor: Tensor) -> bool:
    """Zeros or ones, the same at each loading."""
    return bool((tensor == tensor.flatten()[0]).all())
