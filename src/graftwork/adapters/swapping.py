"""Hot swap: other values in the tensors of an attached adapter. Its shapes stay, so a compiled model is not compiled
again; nothing is attached or detached, so it costs one copy.

R rank of the slot, r of what is put in, I, O channels
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftwork.adapters.installing import check_base, fitting, refuse_merged
from graftwork.adapters.store import read
from graftwork.adapters.stored import StoredAdapter
from graftwork.engine.adapter import Adapter, Placed
from graftwork.engine.attach import require, state_of
from graftwork.engine.modules import LowRankModule
from graftwork.errors import BadFile
from graftwork.reference.technique import Technique


def swap(
    model: nn.Module,
    name: str,
    path: str | Path,
    *,
    stored_name: str | None = None,
    allow_other_base: bool = False,
) -> Adapter:
    """Give an attached adapter the values of a stored one; all or nothing, and never in the middle of a forward.

    A low-rank adapter takes any stored adapter whose change is low-rank (LoRA, PiSSA, KaSA, ...) at some of its
    sites: smaller ranks are padded with zeros, other scales are folded in, sites it does not have change nothing.
    Any other adapter takes one of the same techniques with the same options.

    Args:
        name: the attached adapter. path, stored_name: as `path` and `name` of `load`.

    Raises:
        BadFile: it does not fit, with what differs. WrongBase: it was made for another base.
    """
    refuse_merged(model, "a swap")
    adapter = require(state_of(model), name)
    stored = read(Path(path), model, stored_name)
    if not allow_other_base:
        check_base(model, stored.manifest.base, stored.manifest.name)
    put(model, adapter, fitted(adapter, stored))
    return adapter


def put(model: nn.Module, adapter: Adapter, values: Mapping[str, Tensor]) -> None:
    """Copy values that `fitted` made into the adapter's tensors, between two forwards."""
    targets = [
        (tensor, values[adapter.tensor_name(place, own)])
        for place in adapter.placed
        for own, tensor in place.graft.module.state_dict(keep_vars=True).items()
    ]
    with state_of(model).lock, torch.no_grad():
        for tensor, value in targets:
            tensor.copy_(value, non_blocking=True)


def fitted(adapter: Adapter, stored: StoredAdapter) -> dict[str, Tensor]:
    """A stored adapter's values under the names and in the shapes of an attached one; BadFile where they do not fit."""
    mine, theirs = adapter.techniques, stored.manifest.techniques
    scaffolded = any(hasattr(place.graft.module, "stored_tensors") for place in adapter.placed)
    if not scaffolded and tuple(technique.stored() for technique in mine) == theirs:
        return fitting(adapter, stored)
    if len(mine) != 1 or len(theirs) != 1 or not all(map(_is_slot, adapter.placed)):
        raise BadFile(
            f"{stored.manifest.name!r} is {_shown(theirs)}, the adapter {adapter.name!r} is {_shown(mine)}, and only a "
            "lone LoRA takes another technique's values. Detach it and load the other"
        )
    return _as_factors(adapter, theirs[0], stored)


def _is_slot(place: Placed) -> bool:
    """Whether the module holds a pair of factors and nothing else, so that any low-rank change fits in."""
    return isinstance(place.graft.module, LowRankModule) and set(place.graft.module.state_dict()) == {
        "down",
        "up",
    }


def _as_factors(adapter: Adapter, technique: Technique, stored: StoredAdapter) -> dict[str, Tensor]:
    given = {key: technique.update(tensors) for key, tensors in stored.of(0).items()}
    if None in given.values():
        raise BadFile(
            f"{stored.manifest.name!r} is {technique.name}, whose change is not a product of two factors; swap it into "
            "an adapter of the same technique"
        )
    unknown = sorted(given.keys() - adapter.sites.keys())
    if unknown:
        raise BadFile(
            f"{stored.manifest.name!r} has tensors at {', '.join(unknown[:4])} ({len(unknown)} in all), where "
            f"{adapter.name!r} has no module; attach the slot with these workspaces and layers too"
        )
    values: dict[str, Tensor] = {}
    for place in adapter.placed:
        module: Any = place.graft.module
        down, up = torch.zeros_like(module.down, device="cpu"), torch.zeros_like(module.up, device="cpu")
        update = given.get(place.site.key)
        if update is not None:
            down, up = _padded(update, (down, up), module.scale, f"{stored.manifest.name}: {place.site.key}")
        values |= {adapter.tensor_name(place, "down"): down, adapter.tensor_name(place, "up"): up}
    return values


def _padded(
    update: tuple[Tensor, Tensor], slot: tuple[Tensor, Tensor], scale: float, where: str
) -> tuple[Tensor, Tensor]:
    """down (..., R, I) and up (..., O, R) with scale * up @ down the update, given as (..., r, I) and (..., O, r)."""
    (down, up), (wide_down, wide_up) = update, slot
    missing = wide_down.shape[-2] - down.shape[-2]
    if missing < 0:
        raise BadFile(
            f"{where} has rank {down.shape[-2]}, the slot {wide_down.shape[-2]}; attach the slot with the largest rank "
            "that will be put in"
        )
    down = functional.pad(down, (0, 0, 0, missing))
    up = functional.pad(up / scale, (0, missing))
    if down.shape != wide_down.shape or up.shape != wide_up.shape:
        raise BadFile(
            f"{where} has factors {tuple(down.shape)} and {tuple(up.shape)}, the slot {tuple(wide_down.shape)} and "
            f"{tuple(wide_up.shape)}"
        )
    return down.to(wide_down.dtype), up.to(wide_up.dtype)


def _shown(techniques: tuple[Technique, ...]) -> str:
    return " + ".join(repr(technique) for technique in techniques)
