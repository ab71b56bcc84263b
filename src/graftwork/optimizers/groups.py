"""Parameter groups of a model: which matrices are projected and what follows plain AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from graftwork.errors import NothingMatches, nearest
from graftwork.optimizers.options import check_rank


def low_rank_groups(
    model: nn.Module, *, rank: int, targets: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: the matrices to project, with `rank`, and the others (if any).

    Args:
        rank: of the projection.
        targets: parts of parameter names (`["attn", "mlp"]`): every matrix whose name has one of them. By default
            the matrices inside repeated layers (a number in the dotted name: `layers.3.mlp.up.weight`), without
            embedding tables and those whose shorter side is not above `rank`, for which nothing would be saved.

    Raises:
        NothingMatches: no matrix is selected, or a target selects none.
        BadOption: a target selects a matrix whose shorter side is below `rank`.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    chosen = _layered(model, trainable, rank) if targets is None else _named(trainable, rank, targets)
    low = {"params": [p for name, p in trainable.items() if name in chosen], "rank": rank}
    others = [p for name, p in trainable.items() if name not in chosen]
    return [low, {"params": others}] if others else [low]


def _layered(model: nn.Module, trainable: dict[str, nn.Parameter], rank: int) -> set[str]:
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    chosen = {
        name
        for name, p in trainable.items()
        if any(part.isdigit() for part in name.split(".")) and id(p) not in tables and _short(p) > rank
    }
    if not chosen:
        raise NothingMatches(
            f"no trainable matrix in a repeated layer has a shorter side above rank={rank}: lower the rank, make "
            f"matrices trainable, or name them by targets. {_known(trainable)}"
        )
    return chosen


def _named(trainable: dict[str, nn.Parameter], rank: int, targets: Sequence[str]) -> set[str]:
    chosen: set[str] = set()
    for target in targets:
        found = {name for name, p in trainable.items() if target in name and p.ndim > 1}
        if not found:
            raise NothingMatches(
                f"target {target!r} is in the name of no trainable matrix. {nearest(target, trainable)}"
            )
        chosen |= found
    for name in sorted(chosen):
        check_rank(trainable[name], rank, name)
    if not chosen:
        raise NothingMatches(f"targets is empty: name parts of parameter names. {_known(trainable)}")
    return chosen


def _short(parameter: nn.Parameter) -> int:
    return min(parameter.shape[0], math.prod(parameter.shape[1:])) if parameter.ndim > 1 else 0


def _known(trainable: dict[str, nn.Parameter]) -> str:
    matrices = [f"{name} {tuple(p.shape)}" for name, p in trainable.items() if p.ndim > 1]
    return f"Trainable matrices: {', '.join(matrices[:8]) or 'none'}{', ...' if len(matrices) > 8 else ''}."
