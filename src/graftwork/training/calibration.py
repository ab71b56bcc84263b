"""Batches of a run's own training data for techniques that start from data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from graftwork.reference.technique import Technique
from graftwork.training.materials import Materials
from graftwork.training.recipe import Training


def calibration(
    materials: Materials, techniques: Sequence[Technique], training: Training
) -> DataLoader[Mapping[str, Any]] | None:
    """Batches of training samples, drawn by the seed, alike in all processes; None where no technique asks for data."""
    if not any(technique.needs_data for technique in techniques):
        return None
    rows, size = materials.splits["train"], training.batch_size // training.accumulation
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(training.seed)).tolist()
    chosen = Subset(rows, order[: size * training.calibration_batches])
    collate = materials.task.collator(materials.preprocessor)
    return DataLoader(chosen, batch_size=size, collate_fn=collate)
