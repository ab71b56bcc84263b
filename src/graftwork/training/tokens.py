"""From the tokens that a recipe's contexts name to the router that serves them: numbers of one vocabulary.

Whatever cannot be served is refused here, before anything is trained.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graftwork.engine.verbs import adapters
from graftwork.errors import BadRecipe, RouteError, nearest
from graftwork.models.readers import ImageText
from graftwork.routing import ByToken
from graftwork.tasks.base import Encoded
from graftwork.training.contexts import OTHERS, Context, Token
from graftwork.training.materials import Materials

IMAGE = "<image>"


def router(
    contexts: Mapping[str, Context], model: nn.Module, preprocessor: Any, *, dropout: float = 0.0
) -> ByToken:
    """Tokens to the place of their context, in the recipe's order; those of no context go to the bare base.

    Raises BadRecipe for a model without one row of tokens, a token that is not in the vocabulary, and one that two
    contexts name differently.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise BadRecipe(
            f"contexts: {type(model).__name__} reads two rows of tokens, and a context could be meant for either; "
            "take a decoder or an encoder alone"
        )
    groups = _groups(contexts, model.get_input_embeddings().num_embeddings, preprocessor)  # type: ignore[operator]
    other = next((place for place, context in enumerate(contexts.values()) if context.tokens == OTHERS), -1)
    return ByToken(groups, other=other, dropout=dropout)


def _groups(contexts: Mapping[str, Context], rows: int, preprocessor: Any) -> dict[int, int]:
    """Token number -> place of its context."""
    words = _vocabulary(preprocessor)
    groups: dict[int, int] = {}
    for place, (name, context) in enumerate(contexts.items()):
        for token in context.listed:
            number = _number(token, words, rows)
            if number is None:
                raise BadRecipe(f"contexts.{name}.tokens: {_unknown(token, words, rows, preprocessor)}")
            if number in groups:
                raise BadRecipe(
                    f"contexts.{name}.tokens: {token!r} is token {number}, which is listed already"
                )
            groups[number] = place
    return groups


def _number(token: Token, words: Mapping[str, int], rows: int) -> int | None:
    if isinstance(token, str):
        return words.get(token)
    return token if 0 <= token < rows else None


def check_served(contexts: Mapping[str, Context], by: ByToken, preprocessor: Any, rows: Encoded) -> None:
    """BadRecipe for a context none of whose tokens is in the rows: it would learn nothing."""
    marks = getattr(_tokenizer(preprocessor), "all_special_ids", ())  # a collator may put them in
    seen = {*marks, *(token for item in rows.items for token in item["input_ids"])}
    places = {by.groups.get(token, by.other) for token in seen}
    for place, name in enumerate(contexts):
        if place not in places:
            raise BadRecipe(
                f"contexts.{name}: none of its tokens is in the training rows, so it would learn nothing; "
                "name other tokens, or leave it out"
            )


def check_seen(materials: Materials) -> None:
    """BadRecipe where a site does not see the row of tokens, which then refuses the route: one forward of one row."""
    model, rows = materials.model, materials.splits["train"]
    batch = materials.task.collator(materials.preprocessor)([rows[0]])
    device, mode = next(model.parameters()).device, model.training
    try:
        with torch.no_grad():
            model.eval()(**{name: tensor.to(device) for name, tensor in batch.items()})
    except RouteError as error:
        places = [place for adapter in adapters(model).values() for place in adapter.placed]
        stacks = ", ".join(sorted({place.site.stack for place in places} - {""}))
        raise BadRecipe(
            f"contexts: {error}. Every site of a context must see the row of tokens"
            + (
                f", and these are in the stacks {stacks}: name one in workspaces (text.attention.*)"
                if stacks
                else ""
            )
        ) from error
    finally:
        model.train(mode)


def _unknown(token: Token, words: Mapping[str, int], rows: int, preprocessor: Any) -> str:
    if isinstance(token, int):
        return f"{token} is no token's number; they go from 0 to {rows - 1}"
    read = " ".join(_tokenizer(preprocessor).tokenize(token))
    close = difflib.get_close_matches(token, words, cutoff=0.7)
    hint = f". {nearest(token, close)}" if close else f"; the tokenizer reads it as {read}"
    return f"{token!r} is not in the vocabulary of {len(words)}{hint}"


def _vocabulary(preprocessor: Any) -> dict[str, int]:
    words = dict(_tokenizer(preprocessor).get_vocab())
    return {**words, IMAGE: preprocessor.image_token} if isinstance(preprocessor, ImageText) else words


def _tokenizer(preprocessor: Any) -> Any:
    return preprocessor.tokenizer if isinstance(preprocessor, ImageText) else preprocessor
