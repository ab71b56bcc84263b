"""Search of a weight on validation data: a grid, or golden section; everything tried is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from graftwork.composition.heads import MERGE
from graftwork.composition.methods import Method
from graftwork.composition.verbs import PARAMETERS, combine
from graftwork.engine.attach import detach
from graftwork.engine.verbs import active
from graftwork.errors import BadOption

GOLDEN = (math.sqrt(5) - 1) / 2
Score = Callable[[float], float]


@dataclass(frozen=True)
class Search:
    """What was tried, in order, as (weight, score); higher scores are better.

    Attributes:
        tried: every weight once.
    """

    tried: tuple[tuple[float, float], ...]

    @property
    def best(self) -> float:
        """The weight of the highest score, the first of equal ones."""
        return max(self.tried, key=lambda trial: trial[1])[0]

    @property
    def score(self) -> float:
        """The highest score."""
        return max(score for _, score in self.tried)


def grid(score: Score, low: float = 0.0, high: float = 1.0, points: int = 11) -> Search:
    """Evenly spaced weights, both ends included."""
    _check_range(low, high)
    if points < 2:
        raise BadOption(f"points={points} must be at least 2")
    weights = [low + (high - low) * number / (points - 1) for number in range(points)]
    return Search(tuple((weight, _checked(score, weight)) for weight in weights))


def golden(score: Score, low: float = 0.0, high: float = 1.0, tolerance: float = 0.01) -> Search:
    """Golden-section search: for a score with one peak in the range, the fewest evaluations.

    Both ends are tried too, where the best often lies. Stops when the peak is bracketed within `tolerance`.
    """
    _check_range(low, high)
    if not tolerance > 0:
        raise BadOption(f"tolerance={tolerance} must be above 0")
    tried = {end: _checked(score, end) for end in (low, high)}
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    while high - low > tolerance:
        for weight in (left, right):
            if weight not in tried:
                tried[weight] = _checked(score, weight)
        if tried[left] >= tried[right]:
            high, right, left = right, left, right - GOLDEN * (right - low)
        else:
            low, left, right = left, right, left + GOLDEN * (high - left)
    return Search(tuple(tried.items()))


def scored(
    model: nn.Module,
    weights: Callable[[float], Mapping[str, float]],
    score: Callable[[nn.Module], float],
    *,
    method: Method = PARAMETERS,
    head: str = MERGE,
) -> Score:
    """A score of one weight: the sum it gives is attached, scored and taken off again.

    Args:
        weights: the weight that is searched -> the weights of the attached adapters, `lambda w: {"a": w, "b": 1 - w}`.
        score: a number of the model with the sum active, higher is better.
    """

    def of(weight: float) -> float:
        name = "_searched"
        with active(model):
            combine(model, weights(weight), name=name, method=method, head=head)
            try:
                return score(model)
            finally:
                detach(model, name)

    return of


def _checked(score: Score, weight: float) -> float:
    found = float(score(weight))
    if math.isnan(found):
        raise BadOption(f"the score at weight {weight:g} is NaN, which cannot be compared")
    return found


def _check_range(low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise BadOption(f"the range [{low}, {high}] of weights is empty or not finite")
