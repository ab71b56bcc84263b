"""What a parameter group may say, checked when it is added."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from graftwork.errors import BadOption, StateError, nearest
from graftwork.optimizers.moments import check_bits
from graftwork.optimizers.projection import SVDS

BESIDE = ("params", "rank", "param_names", "name", "initial_lr")  # keys of a group that are no option


def check_group(group: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise BadOption for an unknown key, a value out of range or a rank that does not fit, StateError for
    sharded parameters."""
    known = {*BESIDE, *options}
    for key in group:
        if key not in known:
            raise BadOption(f"a parameter group has the unknown option {key!r}. {nearest(key, known)}")
    for name in ("lr", "eps", "weight_decay"):
        _at_least(group, name, 0)
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise BadOption(f"betas={betas}: take two numbers from 0 to below 1")
    if group.get("rank") is not None:
        _check_low_rank(group)


def _check_low_rank(group: Mapping[str, Any]) -> None:
    _whole(group, "rank", 1)
    _whole(group, "refresh_interval", 1)
    _above(group, "scale", 0)
    if group["svd"] not in SVDS:
        raise BadOption(f"svd={group['svd']!r} is unknown. {nearest(str(group['svd']), SVDS)}")
    check_bits(group["state_bits"])
    if "damping" in group:
        _above(group, "damping", 0)
        _whole(group, "history", 0)
        if not isinstance(group["clear_history"], bool):
            raise BadOption(f"clear_history={group['clear_history']!r}: take True or False")
    for parameter in group["params"]:
        check_rank(parameter, group["rank"], "a parameter")


def check_rank(parameter: Tensor, rank: int, name: str) -> None:
    """Raise unless the parameter can be projected to `rank`."""
    shape = " x ".join(str(size) for size in parameter.shape)
    if isinstance(parameter, DTensor):
        raise StateError(
            f"{name} ({shape}) is sharded, and its gradient has no decomposition in one place: copy the model "
            "to each process (DDP) instead"
        )
    if parameter.ndim < 2 or not parameter.is_floating_point():
        raise BadOption(f"{name} ({shape}) is no real matrix: put it into a group without rank")
    short = min(parameter.shape[0], math.prod(parameter.shape[1:]))
    if rank > short:
        raise BadOption(
            f"rank={rank} is above the shorter side {short} of {name} ({shape}): lower it, or put this one into "
            "a group without rank"
        )


def _at_least(group: Mapping[str, Any], name: str, least: float) -> None:
    if not (_is_number(group[name]) and group[name] >= least):
        raise BadOption(f"{name}={group[name]!r}: take a number from {least}")


def _above(group: Mapping[str, Any], name: str, bound: float) -> None:
    if not (_is_number(group[name]) and group[name] > bound):
        raise BadOption(f"{name}={group[name]!r}: take a number above {bound}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | Tensor) and not isinstance(value, bool)


def _whole(group: Mapping[str, Any], name: str, least: int) -> None:
    value = group[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadOption(f"{name}={value!r}: take a whole number from {least}")
