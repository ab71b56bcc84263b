"""How much memory an optimiser's state takes."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer


def state_bytes(optimizer: Optimizer) -> dict[str, int]:
    """State key -> bytes of its tensors over all parameters, and their `total`; of any torch optimiser.

    Exact: whole storages are counted, so a view that keeps a larger tensor alive counts as the larger one. State
    is made in the first step, before which there is none.
    """
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in seen:
                seen.add(value.untyped_storage().data_ptr())
                sizes[key] = sizes.get(key, 0) + value.untyped_storage().nbytes()
    return {**sizes, "total": sum(sizes.values())}
