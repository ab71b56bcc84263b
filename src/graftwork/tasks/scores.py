"""Metrics as functions of arrays. scikit-learn and scipy do the arithmetic where they have it."""

from __future__ import annotations

import numpy as np


def classification_scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 averaged over the classes that occur, Matthews correlation; inputs are class numbers."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        "matthews": float(matthews_corrcoef(labels, predicted)),
    }
