"""An anatomy is data: for one model family, which module is which workspace.

Paths are relative to the model that owns `config.model_type` (a family is looked up for each submodel, so a
classifier around BERT and a captioner around CLIP and GPT-2 need no entry of their own). `{layer}` stands for the
number of the layer, `*` for any single path segment; a path that a variant lacks is skipped, so one table can serve
variants (with or without bias, with one or two norms).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graftwork.reference.site import Side


@dataclass(frozen=True)
class Part:
    """Which channels of a fused projection a workspace owns.

    Args:
        index: position among the parts (query 0, key 1, value 2).
        layout: "blocks" (all of query, then key, then value; widths by `widths`), or "interleaved"
            (for each head its query, key and value: GPT-NeoX).
        widths: names of what gives each block's width: "query", "key" (key and value), "intermediate".
    """

    index: int
    layout: str = "blocks"
    widths: tuple[str, ...] = ("query", "key", "key")


@dataclass(frozen=True)
class Place:
    """Where a workspace is: a module path (or several), the side, and details for the odd cases.

    Args:
        path: module path relative to the layer (`self_attn.q_proj`), `*` for any one segment.
        side: INPUT when the workspace is what the module reads.
        entry: path of the module whose input a parallel module reads, when not the module's own.
        part: the channels this workspace owns of a fused projection.
        parameter: a bare parameter instead of a module's weight (fused experts).
        read_only: the host reads the weight and never calls the module.
    """

    path: str
    side: Side = Side.OUTPUT
    entry: str | None = None
    part: Part | None = None
    parameter: str | None = None
    read_only: bool = False


Places = Mapping[str, "Place | str | tuple[Place | str, ...]"]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A run of layers of one kind.

    Args:
        name: "" when the model has one stack, else "encoder", "decoder", "vision", "text".
        path: module that owns and runs the layers (`model`, `encoder`, `transformer`): where positions are put in
            and taken out at the sequence port. "" is the base model itself.
        layers: path of one layer, `layers.{layer}` or `stages.{stage}.layers.{layer}`; numbered in order found.
        places: workspaces inside a layer.
        attention: path of the attention module inside a layer (attention port), None where there is none.
        cross_attention: likewise for cross-attention.
        sequence: how the sequence port enters: "stack" (inputs or embeddings of the stack), "layers" (input of the
            first layer, output of the last: vision towers), or None where it cannot, with `sequence_reason`.
        causal: whether attention looks back only.
    """

    name: str = ""
    path: str = ""
    layers: str
    places: Places
    attention: str | None = None
    cross_attention: str | None = None
    sequence: str | None = "stack"
    sequence_reason: str = ""
    causal: bool = False


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The map of one model family.

    Args:
        families: the `config.model_type` values it serves.
        stacks: runs of layers.
        places: workspaces outside layers (`embedding`, `norm.final`, `pooler`), relative to the base model.
        heads: workspaces outside the base model, relative to the whole model: `head` (task heads, trained fresh
            with each adapter) and `lm_head`.
        prefix: attribute under which a task model holds its base model (`bert`, `model`); transformers'
            `base_model_prefix`.
        attention_reason: why the attention port is refused, where it is.
    """

    families: tuple[str, ...]
    stacks: tuple[Stack, ...]
    places: Places = field(default_factory=dict)
    heads: Places = field(default_factory=dict)
    attention_reason: str = ""
