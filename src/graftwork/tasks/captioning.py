"""Captioning: a text for an image, by a language model that reads image rows among its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from graftwork.data.rows import Rows
from graftwork.errors import BadData
from graftwork.models.readers import ImageText
from graftwork.reference.technique import AtLeast
from graftwork.tasks.base import IGNORED, Collator, Encoded, Item, Task
from graftwork.tasks.causal_lm import CausalLM
from graftwork.tasks.image_classification import check_images, rgb
from graftwork.tasks.overlap import bleu, exact_match, rouge_l
from graftwork.tasks.padding import text_collator


@dataclass(frozen=True, kw_only=True)
class Captioning(Task):
    """An image's rows come first, then the prompt, then the caption, which alone counts in the loss.

    Args:
        prompt: what stands between image and caption.
        max_length: tokens of prompt and caption together; a caption that is too long loses its end.
    """

    name: ClassVar[str] = "captioning"
    columns: ClassVar[Mapping[str, str]] = {"image": "a file or an array", "caption": "what is to be said"}
    model_class: ClassVar[str] = "AutoModelForImageTextToText"
    best_metric: ClassVar[str] = "perplexity"
    greater_is_better: ClassVar[bool] = False
    preprocessor: ClassVar[str] = "image-text"

    prompt: str = ""
    max_length: Annotated[int, AtLeast(4)] = 64

    preprocess_logits = CausalLM.preprocess_logits
    metrics = CausalLM.metrics

    def _encode(self, rows: Rows, preprocessor: ImageText, training: bool) -> Encoded:
        check_images(rows["image"], rows.origin)
        start = preprocessor.image_ids + preprocessor.ids(self.prompt)
        captions = [preprocessor.ids(text) + preprocessor.end for text in rows["caption"]]
        most = self.max_length - len(start) + len(preprocessor.image_ids)
        if most < 1:
            raise BadData(f"{self.name}: the prompt alone has max_length={self.max_length} tokens or more")
        over = [max(0, len(caption) - most) for caption in captions]
        items = [
            {"image": image, "input_ids": start + said[:most], "labels": [IGNORED] * len(start) + said[:most]}
            for image, said in zip(rows["image"], captions, strict=True)
        ]
        return Captioned(items, preprocessor, sum(cut > 0 for cut in over), sum(over))

    def collator(self, preprocessor: ImageText) -> Collator:
        return text_collator(preprocessor.tokenizer)


class Captioned(Encoded):
    """Examples whose pixels are computed when asked for."""

    def __init__(
        self, items: Sequence[Item], preprocessor: ImageText, truncated: int, tokens_cut: int
    ) -> None:
        super().__init__(items, truncated, tokens_cut)
        self.preprocessor = preprocessor

    def __getitem__(self, number: int) -> Item:
        item = self.items[number]
        ids = item["input_ids"]
        return {
            "pixel_values": self.preprocessor.pixels(rgb(item["image"])),
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": item["labels"],
        }


def caption(
    model: nn.Module,
    images: Sequence[Any],
    preprocessor: ImageText,
    *,
    prompt: str = "",
    batch_size: int = 32,
    max_new_tokens: int = 32,
) -> list[str]:
    """Greedy captions of images (files or arrays), by whatever is active or routed, in evaluation mode."""
    start = torch.tensor(preprocessor.image_ids + preprocessor.ids(prompt))
    device = next(model.parameters()).device
    training, said = model.training, []
    model.eval()
    try:
        for first in range(0, len(images), batch_size):
            pixels = torch.stack(
                [preprocessor.pixels(rgb(image)) for image in images[first : first + batch_size]]
            )
            ids = start.expand(len(pixels), -1).to(device)
            out: Tensor = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=preprocessor.tokenizer.pad_token_id,
                eos_token_id=preprocessor.end or None,
            )
            said += preprocessor.tokenizer.batch_decode(out[:, len(start) :], skip_special_tokens=True)
    finally:
        model.train(training)
    return [text.strip() for text in said]


def caption_scores(said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Exact match, ROUGE-L and BLEU of captions with one reference each."""
    pairs = list(zip(said, wanted, strict=True))
    return {
        "exact_match": sum(exact_match(a, b) for a, b in pairs) / len(pairs),
        "rouge_l": sum(rouge_l(a, b) for a, b in pairs) / len(pairs),
        "bleu": bleu(said, wanted),
    }
