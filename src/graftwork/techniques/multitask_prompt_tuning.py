"""Multitask prompt tuning: one prompt for all tasks, times a thin matrix of each (Wang et al. 2023, arXiv:2303.02861).

Task k puts P * (U_k V_k) in front of the embedded sequence, * elementwise: P is common to the tasks, U_k has a row
for each position and V_k one for each channel. A task is an adapter of its own; those that are trained together
name one whose prompt they share (`shares`), train it with `trainable` and mix in a batch by a route. A new task
starts from trained ones (`sources`): with a copy of their prompt and the mean of their factors, or with the
prompt alone (`factors=False`). It is not the identity: attaching changes the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from graftwork.engine.modules import PromptModule
from graftwork.errors import BadOption
from graftwork.initialisers.rows import prompt_rows, text_ids
from graftwork.reference.card import Card, Insertions
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuning(Technique):
    """Put a prompt in front that tasks have in common, times a low-rank matrix of the task's own.

    Args:
        length: number of positions.
        rank: of the task's matrix.
        init: "normal", "vocabulary" (rows of the embedding table) or "text": where the common prompt starts.
        text: what it starts as.
        ids: its tokens.
        shares: name of an attached adapter whose common prompt is this one's too.
        sources: names of attached adapters to start from.
        factors: start from their tasks' factors too.
        front: before a leading summary position (CLS) too, where it usually stays first.
    """

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.EMBEDDING,
        adaptation=Adaptation.ADDITION,
        input=Input.DATA,
        insertion=Insertion.PARALLEL,
        insertions=Insertions.ONE,
        integration=Integration.CONCATENATION,
        workspaces=("encoder.embedding|embedding",),
        linear=False,
        identity_at_init=False,
        token_wise=False,
        formula="X' = [P * (U V) ; X], P common to all tasks",
        parameters="length x width, once for all tasks; rank (length + width) for each",
        citation="Wang et al. 2023, Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning, "
        "arXiv:2303.02861",
    )

    length: Annotated[int, AtLeast(1)] = 20
    rank: Annotated[int, AtLeast(1)] = 1
    init: Literal["normal", "vocabulary", "text"] = "normal"
    text: str = ""
    ids: tuple[int, ...] = ()
    shares: str = ""
    sources: tuple[str, ...] = ()
    factors: bool = True
    front: bool = False

    def tokenized(self, encode: Callable[[str], Sequence[int]]) -> MultitaskPromptTuning:
        return replace(self, ids=text_ids(encode, self.text, self.ids))

    def others(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name in (self.shares, *self.sources) if name))

    def build(self, site: Site) -> nn.Module:
        return TaskPrompt(prompt_rows(site, self.length, self.init, self.text, self.ids), self)

    def stored(self) -> MultitaskPromptTuning:
        return MultitaskPromptTuning(
            length=self.length,
            rank=self.rank,
            front=self.front,
            workspaces=self.workspaces,
            layers=self.layers,
        )


class TaskPrompt(PromptModule):
    def __init__(self, rows: Tensor, chosen: MultitaskPromptTuning) -> None:
        super().__init__()
        self.prompt = nn.Parameter(rows)
        self.columns = nn.Parameter(torch.empty(len(rows), chosen.rank).normal_(std=0.02))
        self.rows = nn.Parameter(torch.empty(chosen.rank, rows.shape[1]).normal_(std=0.02))
        self.front, self.chosen = chosen.front, chosen

    def forward(self) -> Tensor:
        return self.prompt * (self.columns @ self.rows)

    @torch.no_grad()
    def meet(self, theirs: Mapping[str, Sequence[object]]) -> None:
        known = {name: grafts[0].module for name, grafts in theirs.items()}  # type: ignore[attr-defined]
        for name, other in known.items():
            if not isinstance(other, TaskPrompt) or other.prompt.shape != self.prompt.shape:
                raise BadOption(
                    f"{self.chosen.name}: {name!r} has no task's prompt of {tuple(self.prompt.shape)}"
                )
        sources = [known[name] for name in self.chosen.sources]
        if self.chosen.shares:
            self.prompt = known[self.chosen.shares].prompt
        elif sources:
            self.prompt.copy_(sources[0].prompt)
        if sources and self.chosen.factors:
            self.columns.copy_(torch.stack([source.columns for source in sources]).mean(0))
            self.rows.copy_(torch.stack([source.rows for source in sources]).mean(0))
