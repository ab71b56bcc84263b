"""Which rows of the logits count.

N examples; B samples, T tokens; D classes or tokens of the vocabulary; M rows that count
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.errors import BadOption, StateError

IGNORED = -100  # label of rows that do not count, as everywhere in transformers


def counted_rows(logits: Tensor | None, labels: Tensor | None, shifted: bool) -> Tensor:
    """(M, D) rows that predict a counted label, in fp32 (float64 stays).

    Args:
        logits: (N, D) or (B, T, D).
        labels: (N,), (B, T), or anything floating with N rows (regression, several labels): all rows count.
        shifted: position t predicts label t + 1, as in causal language models. BA-LoRA's code masks unshifted
            logits by unshifted labels and so takes the rows that hold an answer token, among them the last,
            which predicts nothing, and without the last row of the prompt, which predicts the first. Here the
            rows are those of the task loss.

    Raises: StateError without logits or labels; BadOption where their shapes do not belong together.
    """
    if logits is None or labels is None:
        raise StateError(
            f"the objectives read logits and labels, and this batch has no "
            f"{'logits' if logits is None else 'labels'}. A lean host keeps no logits: "
            "use gw.lean(model, loss=False); labels belong in the batch"
        )
    if logits.shape[-1] < 2:
        raise BadOption(
            "the objectives on logits compare classes, and this head has one output; leave them out"
        )
    if logits.ndim == 3 and shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if labels.is_floating_point() and logits.ndim == 2 and len(labels) == len(logits):
        return _wide(logits)
    if labels.shape != logits.shape[:-1]:
        raise BadOption(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not belong together: expected "
            "(N, D) with (N,), or (B, T, D) with (B, T)"
        )
    return _wide(logits[labels != IGNORED])


def real_tokens(batch: Mapping[str, Any], key: str) -> Tensor | None:
    """(B, T) which tokens of a batch count at the site of that key, None where the batch does not tell.

    Those that the mask does not hide; in a decoder behind an encoder by its own mask, or else by its labels.
    """
    if "cross_attention" in key:
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if key.startswith("decoder."):
        mask = batch.get("decoder_attention_mask")
        mask = labels != IGNORED if mask is None and labels is not None else mask
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def shifts_labels(model: nn.Module) -> bool:
    """Whether the loss of a transformers model shifts its labels: causal language models do."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(
        model, "loss_type"
    ):
        return False
    kind = model.loss_type or "ForCausalLM"  # transformers falls back to it for names it does not know
    return LOSS_MAPPING.get(str(kind)) is ForCausalLMLoss


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
