"""Texts to token ids, with truncation counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftwork.tasks.base import Encoded, Item

_UNLIMITED = 1_000_000  # tokenizers without a limit report an astronomical one


def limit(tokenizer: Any, wanted: int) -> int:
    """The length limit: the wanted one, or the tokenizer's own where that is smaller."""
    own = tokenizer.model_max_length
    return min(wanted, own) if own and own < _UNLIMITED else wanted


def encode_texts(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> Encoded:
    """One item per text (or pair of texts). The longer of a pair is cut first."""
    most = limit(tokenizer, max_length)
    items: list[Item] = _items(tokenizer, texts, pairs)
    long = [number for number, item in enumerate(items) if len(item["input_ids"]) > most]
    cut = sum(len(items[number]["input_ids"]) - most for number in long)
    if long:
        some_pairs = [pairs[number] for number in long] if pairs else None
        shorter = _items(tokenizer, [texts[n] for n in long], some_pairs, truncation=True, max_length=most)
        for number, item in zip(long, shorter, strict=True):
            items[number] = item
    return Encoded(items, len(long), cut)


def _items(tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, **options: Any) -> list[Item]:
    second = {"text_pair": list(pairs)} if pairs else {}
    encoded = tokenizer(list(texts), **second, **options, verbose=False)
    return [{key: encoded[key][n] for key in encoded} for n in range(len(texts))]
