"""Which experts the tokens of a forward go to, for objectives that ask: what every router of the modules decided.

B samples, T tokens, C channels, E experts, M tokens
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graftwork.engine.seat import Graft
from graftwork.engine.state import State


class Assigned(NamedTuple):
    """What one router decided in one call.

    Attributes:
        key: of the site.
        scores: (..., E) the router's logits, with their graph.
        takes: how many experts a token takes.
        learns: whether the module trains.
        shape: of the whole signal without its channels.
        rows: which rows of it (B,), or which tokens where `scores` has fewer axes than the signal; None: all.
    """

    key: str
    scores: Tensor
    takes: int
    learns: bool
    shape: torch.Size
    rows: Tensor | None

    def where(self, real: Tensor | None) -> Tensor:
        """(M, E) the scores of the tokens that are `real` (B, T); of all where that is None or of another shape."""
        if real is None or (self.shape != real.shape and self.shape != (real.numel(),)):
            return self.scores.flatten(0, -2)
        mine = real.view(self.shape)
        if self.rows is not None:
            by_token = self.scores.dim() <= len(self.shape)
            mine = (mine.flatten() if by_token else mine).index_select(0, self.rows)
        return self.scores[mine]


def note(state: State, graft: Graft, x: Tensor, shape: torch.Size, rows: Tensor | None = None) -> None:
    """Keep what the module's router makes of the signal x (..., C), where an objective asked for it.

    A recomputation in backward does the same and keeps nothing: its forward has been counted.
    """
    if not (state.assigning and graft.module.takes):
        return
    scores = graft.module.scores(x)  # type: ignore[operator]
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        learns = any(parameter.requires_grad for parameter in graft.module.parameters())
        one = Assigned(graft.site.key, scores, graft.module.takes, learns, shape, rows)  # type: ignore[arg-type]
        state.assigned = (*state.assigned, one)
