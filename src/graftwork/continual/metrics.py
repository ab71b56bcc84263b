"""What a run over tasks is measured by, from accuracies R[t][i] on task i after training task t (i <= t).

    A   = mean_i R[T][i]                              average accuracy after the last task
    F   = mean_{i<T} (max_k R[k][i] - R[T][i])         forgetting, over k < T ("before"), or k <= T ("ever")
    BWT = mean_{i<T} (R[T][i] - R[i][i])               backward transfer

F "before" (Renate) is negative where a task ended better than ever before; F "ever" (the code of L2P) is not.
The average of A over t (incremental accuracy) is another number: `incremental_accuracy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from graftwork.errors import BadOption

Accuracies = Sequence[Sequence[float]]


def average_accuracy(accuracies: Accuracies) -> float:
    """Mean accuracy on all tasks after the last one."""
    return _mean(_checked(accuracies)[-1])


def incremental_accuracy(accuracies: Accuracies) -> float:
    """Mean over t of the average accuracy after task t on the tasks so far."""
    return _mean([_mean(row) for row in _checked(accuracies)])


def forgetting(accuracies: Accuracies, over: Literal["before", "ever"] = "before") -> float:
    """Mean drop from the best accuracy on a task to the last one, lower is better."""
    rows = _several(accuracies)
    until = len(rows) if over == "ever" else len(rows) - 1
    drops = [max(row[task] for row in rows[task:until]) - rows[-1][task] for task in range(len(rows) - 1)]
    return _mean(drops)


def backward_transfer(accuracies: Accuracies) -> float:
    """Mean change of a task's accuracy from right after its training to the end."""
    rows = _several(accuracies)
    return _mean([rows[-1][task] - rows[task][task] for task in range(len(rows) - 1)])


def _several(accuracies: Accuracies) -> Accuracies:
    if len(_checked(accuracies)) < 2:
        raise BadOption("forgetting and backward transfer compare tasks; this run has one")
    return accuracies


def _checked(accuracies: Accuracies) -> Accuracies:
    lengths = [len(row) for row in accuracies]
    if not lengths or lengths != list(range(1, len(lengths) + 1)):
        raise BadOption(
            f"row t of the accuracies has t + 1 entries, one for each task so far; these have {lengths}"
        )
    return accuracies


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
