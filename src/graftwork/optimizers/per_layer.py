"""Updating each parameter during backward, as soon as its gradient is whole (GaLore, section 4.3)."""

from __future__ import annotations

from types import TracebackType

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from graftwork.errors import StateError
from graftwork.optimizers.low_rank import LowRankAdamW


class PerLayer:
    """An optimiser that steps during backward; `remove()`, or the end of a `with` block, ends that."""

    def __init__(self, optimizer: LowRankAdamW) -> None:
        self._optimizer = optimizer
        self._handles: list[RemovableHandle] = []
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                self._handles.append(self._hook(parameter, number))

    def _hook(self, parameter: Tensor, number: int) -> RemovableHandle:
        def update(ready: Tensor) -> None:
            # the group is looked up each time: loading a state replaces the groups
            self._optimizer.update([ready], self._optimizer.param_groups[number])
            ready.grad = None

        return parameter.register_post_accumulate_grad_hook(update)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> PerLayer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def per_layer(optimizer: LowRankAdamW) -> PerLayer:
    """Let `backward()` step each parameter when its gradient is whole, and free the gradient at once.

    At no time do all gradients exist together. The trajectory is that of ordinary steps; schedulers and
    `state_dict` work on the one optimiser as ever; `optimizer.step()` finds no gradient left and does nothing.

    What needs all gradients at once, or several backward passes per step, is not for this mode: clipping by a
    global norm (it would see no gradient), accumulation (each backward pass is a step), loss scaling (fp16),
    gradients averaged between processes after backward, parameters shared between re-entrant checkpoints.

    Raises:
        StateError: a parameter holds a gradient already, which the first backward would be added to.
    """
    if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
        raise StateError(
            "gradients of an earlier backward are there: call optimizer.zero_grad() before per_layer"
        )
    return PerLayer(optimizer)
