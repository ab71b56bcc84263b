"""What one process of several decides for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from graftwork.errors import GraftworkError

T = TypeVar("T")


def processes() -> PartialState:
    """This process among those that torchrun or accelerate started together."""
    return PartialState(cpu=not torch.accelerator.is_available())


def by_first(action: Callable[[], T]) -> T:
    """Run `action` in the first process only; all get its answer, or raise its error together."""
    state = processes()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = action()
        except GraftworkError as error:
            outcome[1] = error
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
