"""The names of tensors in HF PEFT's files: `base_model.model.PATH.LEAF` for layer methods."""

from __future__ import annotations

from torch import Tensor

LAYERS = "base_model.model."
"""In front of the paths of layer methods."""

PROMPTS = "base_model."
"""In front of the paths of the modules that prompt methods save along."""

FROZEN = ("vera_A", "vera_B")
"""Random matrices for all modules, which stand at `base_model.`."""

PROMPT = "prompt_embeddings"


def pop_leaf(tensors: dict[str, Tensor], leaf: str) -> dict[str, Tensor]:
    """Take out the tensors whose name ends in `.LEAF`; path -> tensor."""
    names = [name for name in tensors if name.endswith(f".{leaf}")]
    return {name.removesuffix(f".{leaf}"): tensors.pop(name) for name in names}
