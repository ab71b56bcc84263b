"""What a checkpoint must carry, as plain tensors and JSON values, and putting it back.

Tensors of a sharded model are gathered on reading and cut again on writing, so a run can go on with another
number of processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from graftwork.errors import BadFile

GRAFTS = ".grafts."


def whole(tensor: Tensor) -> Tensor:
    """A detached copy on the CPU; every process must take part when the tensor is sharded."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu", copy=True)


def like(target: Tensor, value: Tensor) -> Tensor:
    """`value` on the device and in the sharding of `target`."""
    value = value.to(target.device)
    if isinstance(target, DTensor) and value.shape == target.shape:
        return distribute_tensor(value, target.device_mesh, target.placements)
    return value


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of everything training changes: trainable parameters and the adapters' own buffers."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if GRAFTS in name and name in kept}
    return {**parameters, **buffers}


def restore_trained(model: nn.Module, values: Mapping[str, Tensor], origin: str) -> None:
    """Copy `values` into the trained tensors; raises BadFile unless names and shapes are the same."""
    here = trained(model)
    odd = sorted(here.keys() ^ values.keys())
    odd += [n for n in here.keys() & values.keys() if here[n].shape != values[n].shape]
    if odd:
        raise BadFile(f"{origin} belongs to another model or technique; it differs in {', '.join(odd[:5])}")
    with torch.no_grad():
        for name, tensor in here.items():
            tensor.copy_(like(tensor, values[name]))


def optimizer_state(optimizer: Any, names: Mapping[int, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by `PARAMETER|KEY`, JSON values): moments and steps by parameter, and each group's numbers."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for parameter in _parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            name = f"{names[id(parameter)]}|{key}"
            if isinstance(value, Tensor):
                tensors[name] = whole(value)
            else:
                plain[name] = value
    return tensors, {"state": plain, "groups": [_numbers(group) for group in optimizer.param_groups]}


def restore_optimizer(
    optimizer: Any, names: Mapping[int, str], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_state` read, for parameters sharded as they are now."""
    saved: dict[str, Any] = {**tensors, **values["state"]}
    by_name = {names[id(parameter)]: parameter for parameter in _parameters(optimizer)}
    numbers = {id(parameter): number for number, parameter in enumerate(_parameters(optimizer))}
    state: dict[int, dict[str, Any]] = {}
    for full, value in saved.items():
        name, _, key = full.rpartition("|")
        placed = like(by_name[name], value) if isinstance(value, Tensor) else value
        state.setdefault(numbers[id(by_name[name])], {})[key] = placed
    groups = optimizer.state_dict()["param_groups"]
    merged = [{**group, **kept} for group, kept in zip(groups, values["groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": merged})


def random_state() -> dict[str, Any]:
    """Python's, numpy's and torch's generators as JSON values and byte tensors."""
    version, words, gauss = random.getstate()
    drawn: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = drawn
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [
            name,
            keys.tolist(),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random(state: Mapping[str, Any]) -> None:
    """Put the generators back where `random_state` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _parameters(optimizer: Any) -> Iterable[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key in {"lr", "initial_lr", "weight_decay"}}
