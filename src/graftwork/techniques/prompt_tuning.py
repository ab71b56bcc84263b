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

import torch
from torch import Tensor, nn

from graftwork.engine.modules import PromptModule
from graftwork.errors import BadOption
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

    def __post_init__(self) -> None:
        super().__post_init__()
        given = bool(self.text or self.ids)
        if given != (self.init == "text"):
            need = "needs `text` (or its `ids`)" if not given else "starts from no text; use init='text'"
            raise BadOption(f"{self.name}: init={self.init!r} {need}")

    def tokenized(self, encode: Callable[[str], Sequence[int]]) -> PromptTuning:
        return self if self.ids or not self.text else replace(self, ids=tuple(encode(self.text)))

    def build(self, site: Site) -> nn.Module:
        module = Prompt(self.length, site.width)
        module.front = self.front
        if site.matrix is None and self.init != "normal":
            raise BadOption(f"{self.name}: {site.key} has no vocabulary to draw from; use init='normal'")
        if site.matrix is not None and not module.prompt.is_meta:
            start(module.prompt, site.matrix(), self)
        return module

    def stored(self) -> PromptTuning:
        return replace(self, init="normal", text="", ids=())


class Prompt(PromptModule):
    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.prompt, std=0.02)

    def forward(self) -> Tensor:
        return self.prompt


@torch.no_grad()
def start(prompt: Tensor, table: Tensor, chosen: PromptTuning) -> None:
    """Give a prompt (N, C) the spread, or rows, of an embedding table (C, vocabulary)."""
    if chosen.init == "normal":
        prompt.normal_(std=table.std().item())
        return
    count = table.shape[1]
    if chosen.init == "vocabulary":
        ids = torch.randint(count, (len(prompt),), device=table.device)
    else:
        ids = torch.tensor(_repeated(chosen, count), device=table.device)
    prompt.copy_(table[:, ids].mT)


def _repeated(chosen: PromptTuning, count: int) -> list[int]:
    """The text's ids, one for each position."""
    if not chosen.ids:
        raise BadOption(
            f"{chosen.name}: text={chosen.text!r} has no ids yet. Make them with the base's tokenizer, "
            "technique.tokenized(tokenizer.encode), before attach"
        )
    strange = [one for one in chosen.ids if not 0 <= one < count]
    if strange:
        raise BadOption(
            f"{chosen.name}: id {strange[0]} is not in the vocabulary of {count}; use its tokenizer"
        )
    return [chosen.ids[i % len(chosen.ids)] for i in range(chosen.length)]
