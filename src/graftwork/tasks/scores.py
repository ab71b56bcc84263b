"""Metrics as functions of arrays. scikit-learn and scipy do the arithmetic where they have it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from graftwork.tasks.base import IGNORED


def classification_scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 averaged over the classes that occur, Matthews correlation; inputs are class numbers."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        "matthews": float(matthews_corrcoef(labels, predicted)),
    }


def regression_scores(predicted: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Pearson, Spearman, root mean square error, mean absolute error. A correlation that is undefined
    (constant predictions, fewer than two rows) counts as 0, so that no run is chosen for it."""
    errors = predicted.astype(np.float64) - values
    return {
        "pearson": _correlation(predicted, values, ranks=False),
        "spearman": _correlation(predicted, values, ranks=True),
        "rmse": float(np.sqrt((errors**2).mean())),
        "mae": float(np.abs(errors).mean()),
    }


def _correlation(one: np.ndarray, two: np.ndarray, *, ranks: bool) -> float:
    from scipy.stats import pearsonr, spearmanr

    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(two) == 0:
        return 0.0
    both = one.astype(np.float64), two.astype(np.float64)
    return float((spearmanr(*both) if ranks else pearsonr(*both)).statistic)


def token_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """(batch, positions, 2): negative log likelihood of each label in nats, and 1 where it is the
    likeliest token.

    Two numbers per token instead of a vocabulary keep evaluation small. Ignored positions get zeros.
    """
    counted = labels != IGNORED
    wanted = labels.clamp(min=0)[..., None]
    chosen = logits.gather(-1, wanted)[..., 0].float()
    loss = torch.stack([row.float().logsumexp(-1) for row in logits]) - chosen  # fp32 of one row at a time
    right = logits.argmax(-1) == labels
    return torch.stack([loss, right.float()], -1) * counted[..., None]


def language_scores(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Perplexity and accuracy per token from `token_scores`, over the labels that count."""
    counted = scores[labels != IGNORED].astype(np.float64)
    loss, accuracy = counted.mean(0) if len(counted) else (math.nan, math.nan)
    perplexity = math.inf if loss > 700 else math.exp(loss)
    return {"perplexity": float(perplexity), "token_accuracy": float(accuracy)}
