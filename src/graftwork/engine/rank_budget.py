"""A budget of rank shared by the low-rank modules of one adapter, kept inside any training loop.

Each module is scale * P diag(E) Q. Before a step of the optimiser that owns its tensors, every scalar w with gradient g
adds to a smoothed sensitivity |w g| and its uncertainty (Zhang et al. 2023, arXiv:2303.10512, equations 8 to 11); after
the step, the triplets (column of P, entry of E, row of Q) of least importance over all modules have their E set to 0.
Torch calls both by hooks common to all optimisers, registered with the first budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from graftwork.engine.modules import LowRankModule


@dataclass(frozen=True, kw_only=True)
class BudgetSchedule:
    """How many triplets stay after step t = 1, 2, ...: all, then fewer along a cubic, then the target.

    Attributes:
        start, target: triplets at first and at last.
        total, initial, final: steps in all, before the first cut, after the last.
        interval: steps from one cut to the next.
    """

    start: int
    target: int
    total: int
    initial: int
    final: int
    interval: int

    @property
    def last_cut(self) -> int:
        """The step from which on the choice stays."""
        return self.total - self.final

    def budget(self, step: int) -> int:
        """Triplets that stay, rounded down."""
        if step <= self.initial:
            return self.start
        if step >= self.last_cut:
            return self.target
        left = 1 - (step - self.initial) / (self.last_cut - self.initial)
        return int(self.target + (self.start - self.target) * left**3)

    def cuts(self, step: int) -> bool:
        """Whether triplets are ranked anew after this step."""
        regular = self.initial < step < self.last_cut and step % self.interval == 0
        return regular or step == self.last_cut


class Importance(nn.Module):
    """Smoothed sensitivity and uncertainty of each scalar of one tensor."""

    sensitivity: Tensor
    uncertainty: Tensor

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.register_buffer("sensitivity", torch.zeros_like(tensor, requires_grad=False))
        self.register_buffer("uncertainty", torch.zeros_like(tensor, requires_grad=False))

    def see(self, tensor: Tensor, beta1: float, beta2: float) -> None:
        """Take in the tensor and its gradient."""
        assert tensor.grad is not None
        now = (tensor * tensor.grad).abs().to(self.sensitivity.dtype)
        self.sensitivity.lerp_(now, 1 - beta1)
        self.uncertainty.lerp_((now - self.sensitivity).abs(), 1 - beta2)

    def score(self) -> Tensor:
        """Importance of each scalar."""
        return self.sensitivity * self.uncertainty


class RankedModule(LowRankModule):
    """scale * up diag(values) down, whose triplets (..., R) take part in a budget: `adopt` it."""

    live: Tensor

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.values = nn.Parameter(torch.zeros(down.shape[:-1], device=down.device))
        self.importance = nn.ModuleList(Importance(t) for t in (self.down, self.up, self.values))
        self.register_buffer("live", torch.ones_like(self.values, dtype=torch.bool))

    def adopt(self, shared: RankBudget) -> None:
        """Take part in a budget."""
        self.shared = shared
        shared.members.append(self)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.values.unsqueeze(-1) * self.down, self.up

    def see(self, beta1: float, beta2: float) -> None:
        """Take in the gradients of a step."""
        for tensor, seen in zip((self.down, self.up, self.values), self.importance, strict=True):
            if tensor.grad is not None:
                seen.see(tensor, beta1, beta2)  # type: ignore[operator]

    def scores(self) -> Tensor:
        """Importance of each triplet: of its value, and the means over its row of `down` and column of `up`."""
        down, up, values = (seen.score() for seen in self.importance)  # type: ignore[operator]
        return values + down.mean(-1) + up.mean(-2)  # type: ignore[no-any-return]


class RankBudget(nn.Module):
    """What the modules of one adapter have in common. Its step, and the importances, are buffers: a resumed run
    goes on where it was.
    """

    step: Tensor

    def __init__(self, schedule: BudgetSchedule, beta1: float, beta2: float) -> None:
        super().__init__()
        self.schedule, self.beta1, self.beta2 = schedule, beta1, beta2
        self.members: list[RankedModule] = []
        self.stepping = False
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        _watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _watch(self)  # a copy or a pickle is a budget of its own

    def owned_by(self, optimizer: Optimizer) -> bool:
        """Whether a step of this optimiser is a step of the adapter: of its first module's values, to count once."""
        values = self.members[0].values if self.members else None
        return any(tensor is values for group in optimizer.param_groups for tensor in group["params"])

    def before_step(self) -> None:
        """Count the step and take in its gradients; a step without any (another adapter's turn) does not count."""
        if self.members[0].values.grad is None:
            return
        self.stepping = True
        self.step += 1
        if int(self.step) <= self.schedule.last_cut:
            for member in self.members:
                member.see(self.beta1, self.beta2)

    def after_step(self) -> None:
        """Rank where it is due, and set the values of what is out of budget to 0."""
        self.stepping = False
        step = int(self.step)
        if self.schedule.cuts(step):
            self.rank(self.schedule.budget(step))
        if self.schedule.cuts(step) or step > self.schedule.last_cut:
            for member in self.members:
                member.values.mul_(member.live)

    def rank(self, budget: int) -> None:
        """Mark the `budget` most important triplets of all modules as live; of equal ones, the first."""
        scores = [member.scores() for member in self.members]
        flat = torch.cat([score.flatten().to(scores[0].device) for score in scores])
        live = torch.zeros_like(flat, dtype=torch.bool)
        live[flat.argsort(descending=True, stable=True)[:budget]] = True
        for member, part in zip(self.members, live.split([s.numel() for s in scores]), strict=True):
            member.live.copy_(part.view_as(member.live))


_budgets: WeakSet[RankBudget] = WeakSet()
_registered: list[Any] = []


def _watch(budget: RankBudget) -> None:
    _budgets.add(budget)
    if not _registered:
        _registered.append(register_optimizer_step_pre_hook(_before))
        _registered.append(register_optimizer_step_post_hook(_after))


@torch.no_grad()
def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for budget in list(_budgets):
        if budget.owned_by(optimizer):
            budget.before_step()


@torch.no_grad()
def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for budget in list(_budgets):
        if budget.stepping and budget.owned_by(optimizer):
            budget.after_step()
