"""Key matching: the members of a pool whose keys are most like a query (L2P, Wang et al. 2022, arXiv:2112.08654).

B samples, M members, N chosen, D width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from graftwork.errors import BadOption

Mode = Literal["instance", "batch"]


def similarity(queries: Tensor, keys: Tensor) -> Tensor:
    """Cosines (B, M) of queries (B, D) and keys (M, D)."""
    return functional.normalize(queries, dim=-1) @ functional.normalize(keys, dim=-1).mT


def select(
    queries: Tensor, keys: Tensor, count: int, mode: Mode = "instance", among: Sequence[int] | None = None
) -> Tensor:
    """(B, N) numbers of the chosen members; ties go to the smaller number.

    Args:
        queries: (B, D). keys: (M, D).
        mode: "instance" chooses for each sample by itself. "batch" gives the whole batch the N members that its
            samples chose most often, so that a sample's result depends on who else is in its batch.
        among: only these members.
    """
    with torch.no_grad():
        cosines = similarity(queries, keys)
        if among is not None:
            outside = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
            outside[list(among)] = False
            cosines = cosines.masked_fill(outside, -torch.inf)
        chosen = _largest(cosines, count)
        if mode == "instance":
            return chosen
        votes = torch.bincount(chosen.flatten(), minlength=len(keys))
        return _largest(votes, count).expand(len(queries), -1)


def pull(queries: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:
    """(1/B) sum_b sum_{m chosen for b} cos(q_b, k_m): what is maximised; the only gradient of the keys."""
    return similarity(queries, keys).gather(1, chosen).sum() / len(queries)


def check_mode(mode: str) -> None:
    """BadOption for a mode that does not exist."""
    if mode not in ("instance", "batch"):
        raise BadOption(f"mode={mode!r} is neither 'instance' nor 'batch'")


def _largest(values: Tensor, count: int) -> Tensor:
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
