"""Which optimiser a recipe asks for: AdamW, or one that trains whole weights with little state."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graftwork.errors import BadOption, UnknownName, nearest
from graftwork.optimizers.galore import GaLore
from graftwork.optimizers.groups import low_rank_groups
from graftwork.optimizers.natural_galore import NaturalGaLore

KINDS: Mapping[str, type[GaLore | NaturalGaLore]] = {"galore": GaLore, "natural-galore": NaturalGaLore}
ADAMW = "adamw"
OF_THE_RUN = {"params", "lr", "weight_decay"}  # `training.learning_rate`, `training.weight_decay`


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A low-rank optimiser with its options, before there is a model."""

    kind: type[GaLore | NaturalGaLore]
    rank: int
    targets: tuple[str, ...] | None
    options: Mapping[str, Any]

    def build(self, model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
        """The optimiser of `groups`, each parted into what is projected and what is not."""
        low = low_rank_groups(model, rank=self.rank, targets=self.targets)[0]["params"]
        chosen = {id(parameter) for parameter in low}
        parted: list[dict[str, Any]] = []
        for group in groups:
            projected = [p for p in group["params"] if id(p) in chosen]
            others = [p for p in group["params"] if id(p) not in chosen]
            if projected:
                parted.append({**group, "params": projected, "rank": self.rank})
            if others:
                parted.append({**group, "params": others})
        return self.kind(parted, **self.options)


def make_optimizer(name: str, options: Mapping[str, Any]) -> LowRank | None:
    """What a recipe's `training.optimizer` spells; None is AdamW.

    Raises:
        UnknownName: no such optimiser, or it has no such option.
        BadOption: a value out of range, or no rank.
    """
    if name != ADAMW and name not in KINDS:
        raise UnknownName(f"no optimizer is called {name!r}. {nearest(name, [ADAMW, *KINDS])}")
    known = option_names(name)
    for key in options:
        if key not in known:
            raise UnknownName(f"{name} has no option {key!r}. {nearest(key, known)}")
    return None if name == ADAMW else _low_rank(name, dict(options))


def option_names(name: str) -> set[str]:
    """The options of an optimiser in a recipe."""
    if name == ADAMW:
        return set()
    return {"rank", "targets", *inspect.signature(KINDS[name]).parameters} - OF_THE_RUN


def _low_rank(name: str, options: dict[str, Any]) -> LowRank:
    kind, rank, targets = KINDS[name], options.pop("rank", None), options.pop("targets", None)
    if rank is None:
        raise BadOption(f"{name} needs a rank: {{name: {name}, rank: 8}}")
    if targets is not None and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise BadOption(f"targets={targets!r}: take a list of parts of parameter names")
    if isinstance(options.get("betas"), list):
        options["betas"] = tuple(options["betas"])
    whole = isinstance(rank, int) and rank > 0
    example = torch.empty((rank, rank) if whole else (1, 1), device="meta")
    kind([{"params": [example], "rank": rank}], **options)  # the optimiser's own checks
    return LowRank(kind=kind, rank=rank, targets=None if targets is None else tuple(targets), options=options)
