"""The captioning task: what counts in the loss, what is cut, and a captioner that learns two colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_tokenizers import plain_tokenizer
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import graftwork as gw
from graftwork.data.rows import Rows
from graftwork.errors import BadData, BadOption
from graftwork.models.base import load_base
from graftwork.models.captioner import Captioner, captioner
from graftwork.models.readers import ImageText
from graftwork.routing import ByToken
from graftwork.tasks.base import IGNORED
from graftwork.tasks.captioning import Captioning, caption, caption_scores
from graftwork.testing import tiny

COLOURS = {"a dark picture": 20, "one light picture": 230}
WORDS = "a dark picture one light this shows"


def made() -> tuple[Captioner, ImageText]:
    torch.manual_seed(0)
    model = captioner(tiny("vit"), tiny("llama"))
    side = model.config.vision_config.image_size
    return model, ImageText.of(
        model, plain_tokenizer(WORDS), ViTImageProcessorPil(size={"height": side, "width": side})
    )


def rows(count: int = 2) -> Rows:
    captions = [list(COLOURS)[number % 2] for number in range(count)]
    images = [np.full((8, 8), COLOURS[text], dtype=np.uint8) for text in captions]
    return Rows({"image": images, "caption": captions})


def test_only_the_caption_counts() -> None:
    model, both = made()
    task = Captioning(prompt="this shows")
    encoded = task.encode(rows(), both)
    start = both.rows + 2
    item = encoded[0]
    assert item["input_ids"][: both.rows] == [both.image_token] * both.rows
    assert item["labels"][:start] == [IGNORED] * start
    assert item["labels"][start:] == item["input_ids"][start:] == both.ids("a dark picture") + both.end
    batch = task.collator(both)([encoded[0], encoded[1]])
    loss = model(**batch).loss
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.log_softmax(-1)
    said = [
        -logits[row, place - 1, batch["labels"][row, place]]
        for row, place in (batch["labels"] != IGNORED).nonzero().tolist()
    ]
    torch.testing.assert_close(loss, torch.stack(said).mean())


def test_long_captions_lose_their_end_and_are_counted() -> None:
    _, both = made()
    encoded = Captioning(prompt="this", max_length=4).encode(rows(), both)
    assert (encoded.truncated, encoded.tokens_cut) == (2, 2)
    assert encoded[0]["input_ids"][both.rows :] == both.ids("this a dark picture")
    with pytest.raises(BadData, match="prompt alone"):
        Captioning(prompt="this shows a dark picture", max_length=4).encode(rows(), both)
    with pytest.raises(BadData, match="'caption'"):
        Captioning().encode(Rows({"image": [1]}), both)


def test_a_folder_is_a_base_like_any_other(tmp_path: Path) -> None:
    model, both = made()
    model.save_pretrained(tmp_path)
    both.save_pretrained(tmp_path)
    again, reader = load_base(str(tmp_path), task="captioning")
    assert type(again) is Captioner
    assert (reader.image_token, reader.rows) == (both.image_token, both.rows)
    item, twin = (Captioning().encode(rows(), each)[0] for each in (both, reader))
    torch.testing.assert_close(item["pixel_values"], twin["pixel_values"])
    assert item["input_ids"] == twin["input_ids"]
    with pytest.raises(BadOption, match="reads no images"):
        ImageText.of(tiny("llama"), both.tokenizer, both.images)


def test_contexts_learn_to_say_what_they_see() -> None:
    """Context-LoRA and the connector tell two kinds of pictures apart."""
    model, both = made()
    technique = gw.LoRA(rank=4, workspaces=("text.attention.*", "text.feedforward.*"))
    for name in ("text", "image"):
        gw.attach(model, technique, name=name, head=False)
    gw.trainable(model, "text", "image")
    task = Captioning()
    encoded = task.encode(rows(8), both)
    batch = task.collator(both)([encoded[number] for number in range(8)])
    connector = list(model.model.multi_modal_projector.requires_grad_().parameters())
    trained = [p for name in ("text", "image") for p in gw.adapters(model)[name].parameters()] + connector
    optimiser = torch.optim.AdamW(trained, lr=2e-2)
    router = ByToken({both.image_token: 1}, other=0)
    with gw.route(model, ["text", "image"], by=router):
        for _ in range(40):
            model(**batch).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        said = caption(model, rows(4)["image"], both, max_new_tokens=5, batch_size=3)
    assert said == rows(4)["caption"]


def test_scores() -> None:
    found: dict[str, Any] = caption_scores(["a dark picture", "a light one"], ["A dark picture", "two"])
    assert found["exact_match"] == 0.5
    assert found["rouge_l"] == 0.5
