"""Prompt tuning: trained positions in front of the input (Lester et al. 2021, arXiv:2104.08691).

The embedded sequence X becomes [prompt ; X]. The prompt starts as normal noise of the embedding table's
spread (std 0.02 where the stack has no table), as rows of that table drawn at random (`init="vocabulary"`), or
as those of a text (`init="text"`), repeated or cut to the length. It is not the identity: attaching changes the
outputs.

A text is made into ids by the tokenizer of the base: a recipe does it with its own, elsewhere
`PromptTuning(init="text", text="...").tokenized(tokenizer.encode)` does, or `ids` are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from torch import Tensor, nn

from graftwork.engine.modules import PromptModule
from graftwork.initialisers.rows import prompt_rows, text_ids
from graftwork.reference.card import Card, Insertions
from graftwork.reference.catalogue import register
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Technique


@register
@dataclass(frozen=True, kw_only=True)
class PromptTuning(Technique):
    """Put trained vectors in front of the embedded input.

    Args:
        length: number of positions.
        init: "normal", "vocabulary" (rows of the embedding table) or "text".
        text: what the prompt starts as.
        ids: its tokens.
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
        formula="X' = [prompt ; X]",
        parameters="length x embedding width, once",
        citation="Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, "
        "arXiv:2104.08691",
    )

    length: Annotated[int, AtLeast(1)] = 20
    init: Literal["normal", "vocabulary", "text"] = "normal"
    text: str = ""
    ids: tuple[int, ...] = ()
    front: bool = False

    def tokenized(self, encode: Callable[[str], Sequence[int]]) -> PromptTuning:
        return replace(self, ids=text_ids(encode, self.text, self.ids))

    def build(self, site: Site) -> nn.Module:
        return Prompt(prompt_rows(site, self.length, self.init, self.text, self.ids), self.front)

    def stored(self) -> PromptTuning:
        return replace(self, init="normal", text="", ids=())


class Prompt(PromptModule):
    def __init__(self, rows: Tensor, front: bool) -> None:
        super().__init__()
        self.prompt = nn.Parameter(rows)
        self.front = front

    def forward(self) -> Tensor:
        return self.prompt
