"""AdamW whose moments live in a low-rank projection of each matrix's gradient: what GaLore and kin share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from graftwork.errors import BadOption, StateError
from graftwork.optimizers import moments
from graftwork.optimizers.options import check_group
from graftwork.optimizers.projection import leading_basis, project, project_back

Group = dict[str, Any]
State = dict[str, Any]


class LowRankAdamW(Optimizer):
    """Groups with a `rank` are projected, groups without one follow `torch.optim.AdamW`.

    State of a projected parameter, in fp32 (fp64 for an fp64 parameter): `step`, `projector` (min(n, m), rank),
    `exp_avg` and `exp_avg_sq` of the projected shape, or their 8-bit codes and a scale for each block. Parameters of
    more than two dimensions count as (first, product of the others). Subclasses change what Adam is fed by
    `_condition`.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        if all(group.get("rank") is None for group in self.param_groups):
            raise BadOption(
                f"{type(self).__name__} was given no low-rank parameter, so it would be plain AdamW: make the "
                'groups by low_rank_groups(model, rank=...), or add "rank" to a group of matrices'
            )

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, low-rank where it has a `rank`; raises BadOption, or StateError for sharded parameters."""
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], self.defaults)
        except (BadOption, StateError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.update([p for p in group["params"] if p.grad is not None], group)
        return loss

    @torch.no_grad()
    def update(self, parameters: list[Tensor], group: Group) -> None:
        """One step of some parameters of `group`, each with a gradient."""
        if any(p.grad is not None and (p.grad.is_sparse or isinstance(p.grad, DTensor)) for p in parameters):
            raise StateError(f"{type(self).__name__} takes dense, unsharded gradients only")
        if group.get("rank") is None:
            self._plain(parameters, group)
        else:
            for parameter in parameters:
                self._projected(parameter, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the state of projected parameters keeps its own precision beside bf16 weights."""
        super().load_state_dict(state_dict)
        old = [number for group in state_dict["param_groups"] for number in group["params"]]
        new = [(p, group.get("rank")) for group in self.param_groups for p in group["params"]]
        for number, (parameter, rank) in zip(old, new, strict=True):
            if rank is not None and number in state_dict["state"]:
                saved = state_dict["state"][number]
                self.state[parameter] = {key: _placed(value, parameter) for key, value in saved.items()}

    def _plain(self, parameters: list[Tensor], group: Group) -> None:
        if not parameters:
            return
        states = [self.state[p] for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _projected(self, parameter: Tensor, group: Group) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.flatten(1)
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        state = self.state[parameter]
        step = state.setdefault("step", 0)
        renewed = step % group["refresh_interval"] == 0
        if step:
            unchanged("rank", state["projector"].shape[1], group)
            unchanged("state_bits", moments.bits_of(state), group)
        if renewed:
            state["projector"] = leading_basis(gradient, group["rank"], group["svd"], seed=step)
        low = self._condition(project(gradient, state["projector"]), state, group, renewed)
        state["step"] = step + 1
        change = project_back(_adam_step(low, state, group), state["projector"], gradient.shape)
        parameter.sub_(change.reshape(parameter.shape), alpha=group["scale"])
        parameter.mul_(1 - float(group["lr"]) * group["weight_decay"])

    def _condition(self, low: Tensor, state: State, group: Group, renewed: bool) -> Tensor:
        """What Adam is fed in place of the projected gradient `low`; `renewed`: the basis is a new one."""
        return low


def unchanged(option: str, started: int, group: Group) -> None:
    """Raise BadOption where an option that shapes the state is not what the state was started with."""
    if group[option] != started:
        raise BadOption(
            f"{option}={group[option]}, but the state was started with {option}={started}: keep that, or make a "
            "new optimiser"
        )


def _adam_step(low: Tensor, state: State, group: Group) -> Tensor:
    """lr * sqrt(1 - b2^t) / (1 - b1^t) * M / (sqrt(v) + eps): Adam as in its paper's section 2, eps uncorrected."""
    beta1, beta2 = group["betas"]
    (mean, square), steps = moments.read(state, low), state["step"]
    mean.mul_(beta1).add_(low, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(low, low, value=1 - beta2)
    moments.write(state, mean, square, group["state_bits"])
    rate = float(group["lr"]) * (1 - beta2**steps) ** 0.5 / (1 - beta1**steps)
    return mean / square.sqrt().add_(group["eps"]) * rate


def _placed(value: Any, parameter: Tensor) -> Any:
    """A copy on the parameter's device, so that two optimisers never share state."""
    return value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
