"""An anatomy is data: for one model family, which module is which workspace.

Paths are relative to the model that owns `config.model_type` (a family is looked up for each submodel, so
a classifier around BERT and a captioner around ViT and GPT-2 need no entry of their own). `*` stands for
any one path segment; a path that a variant lacks is skipped, so one table can serve variants (with or
without bias, with one or two norms). What a table leaves out is found by rule: a task head or projection
to the vocabulary by the class of the model around the base, anything else by discovery.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from graftwork.reference.site import Access


class Layout(StrEnum):
    """How the parts of a fused projection lie in its output channels."""

    QKV = "qkv"  # query, then key, then value; query as wide as the output projection's input, key = value
    HEADS = "heads"  # for each head its query, key and value
    EQUAL = "equal"  # parts of one width, one after another


@dataclass(frozen=True)
class Part:
    """Which channels of a fused projection a workspace owns: part `index` of `count`."""

    index: int
    layout: Layout = Layout.QKV
    count: int = 3


@dataclass(frozen=True)
class Place:
    """Where a workspace is.

    Args:
        path: module path (`self_attn.q_proj`), `*` for any one segment, "" for the layer or base itself.
        part: the channels this workspace owns of a fused projection.
        parameter: a bare parameter instead of a module's weight (fused experts, router).
        bare: that parameter is taken as it is, not as a matrix.
        access: whether the host calls the module, reads its weight, or either.
    """

    path: str
    part: Part | None = None
    parameter: str | None = None
    bare: bool = False
    access: Access = Access.CALLED


Places = Mapping[str, "Place | str | tuple[Place | str, ...]"]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A run of layers of one kind.

    Args:
        name: "" when the model has one stack, else "encoder", "decoder", "vision", "text".
        path: module that owns and runs the layers (`decoder`; "" is the base itself): where positions are
            put in and taken out at the sequence port.
        layers: patterns of the layers' paths (`encoder.layer.*`), relative to the base; numbered as found.
        places: workspaces inside a layer, relative to the layer. `attention` and `feedforward` need no entry:
            they follow from the first and last projection; an entry names a module to stand for the block.
        around: workspaces of this stack outside its layers (`embedding`, `norm.final`), relative to the base.
        attention, cross_attention: attention module inside a layer (attention port), None where none is.
        attention_reason: why the attention port is refused, where it is.
        sequence: how positions enter: "stack" (ids or embeddings of the stack), "layers" (input of the first
            layer, output of the last: vision and audio towers), or None where they cannot, with
            `sequence_reason`.
        sequence_start: how many leading positions stay in front of inserted ones (1 where a backbone
            pools the first).
        causal: attention looks back only.
        channel_axis: axis of the channels in what a layer reads and answers (1 for convolutional networks).
    """

    name: str = ""
    path: str = ""
    layers: tuple[str, ...]
    places: Places
    around: Places = field(default_factory=dict)
    attention: str | None = None
    cross_attention: str | None = None
    attention_reason: str = ""
    sequence: str | None = "stack"
    sequence_reason: str = ""
    sequence_start: int = 0
    causal: bool = False
    channel_axis: int = -1


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The map of one model family, or of one model (then with paths from its root).

    Args:
        families: the `config.model_type` values it serves.
        stacks: runs of layers.
        places: workspaces that belong to no stack (`pooler`, `head`, `lm_head`).
        unused: modules that hold tensors but are never called or read (a shared embedding's second name).
    """

    families: tuple[str, ...]
    stacks: tuple[Stack, ...]
    places: Places = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def places_of(places: Places) -> list[tuple[str, Place]]:
    """(workspace, place) of every entry, shorthand paths spelt out."""
    listed = []
    for workspace, entry in places.items():
        for one in entry if isinstance(entry, tuple) else (entry,):
            listed.append((workspace, one if isinstance(one, Place) else Place(one)))
    return listed
