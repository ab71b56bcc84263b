"""Where prompts start: like the rows of an embedding table, or as some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graftwork.errors import BadOption
from graftwork.reference.site import Site


def text_ids(encode: Callable[[str], Sequence[int]], text: str, ids: tuple[int, ...]) -> tuple[int, ...]:
    """The ids, where there are any, else those of the text."""
    return ids or (tuple(encode(text)) if text else ())


def prompt_rows(site: Site, length: int, init: str, text: str = "", ids: Sequence[int] = ()) -> Tensor:
    """(length, C) rows for a stack: "normal" noise of its table's spread (std 0.02 without one), rows drawn from
    the "vocabulary", or those of `ids`, repeated or cut to the length.

    Raises:
        BadOption: a text that is not to start from, no table to take rows from, no ids, or one outside the table.
    """
    if (init == "text") != bool(text or ids):
        raise BadOption(
            "a prompt's init='text' and its `text` (or `ids`) belong together: give both or neither"
        )
    rows = torch.empty(length, site.width).normal_(std=0.02)
    if site.matrix is None and init != "normal":
        raise BadOption(f"{site.key} has no vocabulary to draw a prompt from; use init='normal'")
    if init == "text" and not ids:
        raise BadOption(
            "a prompt with init='text' needs ids: make them of its `text` with the base's tokenizer, "
            "technique.tokenized(tokenizer.encode), before attach"
        )
    if site.matrix is None or rows.is_meta:
        return rows
    table = site.matrix()
    if init == "normal":
        return rows.normal_(std=table.std().item())
    return table[:, _chosen(table, length, init, ids)].mT.clone()


def _chosen(table: Tensor, length: int, init: str, ids: Sequence[int]) -> Tensor:
    count = table.shape[1]
    if init == "vocabulary":
        return torch.randint(count, (length,), device=table.device)
    strange = [one for one in ids if not 0 <= one < count]
    if strange:
        raise BadOption(
            f"id {strange[0]} of a prompt's text is not in the vocabulary of {count}; use its tokenizer"
        )
    return torch.tensor([ids[i % len(ids)] for i in range(length)], device=table.device)
