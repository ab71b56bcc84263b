"""Task loss and objectives together, for any training loop.

objectives = Objectives(model, [Consistency(weight=0.15, temperature=2), Diversity(weight=0.03)])
loss, parts = objectives(model(**batch), batch, progress=step / steps)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graftwork.engine.attach import state_of
from graftwork.errors import StateError
from graftwork.objectives.adapted import modules_of
from graftwork.objectives.base import Context, Objective
from graftwork.objectives.registry import distinct
from graftwork.objectives.rows import real_tokens, shifts_labels
from graftwork.objectives.teacher import base_logits


class Total(NamedTuple):
    """What a batch costs.

    Attributes:
        loss: task loss + sum of weight x term, to be differentiated.
        parts: "task" and each term that counted, unweighted, without gradient.
    """

    loss: Tensor
    parts: dict[str, Tensor]


class Objectives:
    """Adds terms to the loss of an attached model.

    Args:
        model: as `attach` was given it; it is its own teacher.
        terms: each kind once.
        shifted: whether position t predicts label t + 1; None asks a transformers model for its kind of loss.

    Raises: StateError where nothing is attached; BadOption where a kind of term comes twice.
    """

    def __init__(self, model: nn.Module, terms: Sequence[Objective], *, shifted: bool | None = None) -> None:
        state = state_of(model)
        state.assigning = state.assigning or any(term.reads_routers for term in terms)
        self.names = distinct(term.name for term in terms)
        self.terms = tuple(terms)
        self._model = model
        self._shifted = shifts_labels(model) if shifted is None else shifted

    def __call__(self, outputs: Mapping[str, Any], batch: Mapping[str, Any], *, progress: float) -> Total:
        """The total loss of a batch.

        Args:
            outputs: of the model with its adapters, with `loss`, and `logits` where a term reads them.
            batch: what the model was called with, `labels` among it.
            progress: share of the steps done, in [0, 1].
        """
        loss: Tensor | None = outputs.get("loss")
        if loss is None:
            raise StateError("the outputs have no loss to add objectives to; call the model with labels")
        weights = {term: term.weight_at(progress) for term in self.terms}
        context = self._context(outputs, batch, progress)
        parts = {"task": loss.detach()}
        with torch.autocast(loss.device.type, enabled=False):
            for term, weight in weights.items():
                if weight:
                    value = term(context)
                    loss = loss + weight * value
                    parts[term.name] = value.detach()
        return Total(loss, parts)

    def _context(self, outputs: Mapping[str, Any], batch: Mapping[str, Any], progress: float) -> Context:
        kind, state = self._model_device_type(), state_of(self._model)
        routers, state.assigned = state.assigned, ()  # a teacher's forward comes after, and nothing is kept
        precision = torch.get_autocast_dtype(kind)
        mixed = torch.is_autocast_enabled(kind)

        def teach() -> Tensor | None:  # in the student's precision, whatever that of the terms is
            with torch.autocast(kind, dtype=precision, enabled=mixed):
                return base_logits(self._model, batch)

        return Context(
            logits=outputs.get("logits"),
            labels=batch.get("labels"),
            shifted=self._shifted,
            teach=teach,
            modules=modules_of(self._model),
            progress=progress,
            routers=routers,
            real=partial(real_tokens, batch),
        )

    def _model_device_type(self) -> str:
        return next(self._model.parameters()).device.type
