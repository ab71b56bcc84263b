"""What a host answers, and whether two answers are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def logits(model: Any, **batch: Any) -> Tensor:
    return model(**batch).logits


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
