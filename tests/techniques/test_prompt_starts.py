"""Where prompts start: rows of a text, as the embedding answers them, against peft and the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import graftwork as gw
from graftwork.errors import BadOption, BadRecipe
from graftwork.tasks.registry import make_task
from graftwork.testing import tiny
from graftwork.training.materials import Materials


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(99)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def prompt_of(model: Any, technique: gw.Technique) -> torch.Tensor:
    return next(gw.attach(model, technique).parameters()).detach()


@pytest.mark.parametrize("length", [2, 3, 8])
def test_text_is_cut_or_repeated_as_in_peft(length: int, tokenizer: Any, tmp_path: Path) -> None:
    text = "w7 w30 w98"
    tokenizer.save_pretrained(tmp_path)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=length,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(tmp_path),
    )
    theirs = peft.get_peft_model(tiny("llama"), config).prompt_encoder.default.embedding.weight
    ours = gw.PromptTuning(length=length, init="text", text=text).tokenized(tokenizer.encode)
    assert torch.equal(prompt_of(tiny("llama"), ours), theirs)


def test_rows_are_those_the_embedding_answers_with() -> None:
    model: Any = tiny("gemma3")
    answers = model.get_input_embeddings()(torch.tensor([4, 5]))
    found = prompt_of(model, gw.PromptTuning(length=2, init="text", ids=(4, 5)))
    torch.testing.assert_close(found, answers)
    drawn = prompt_of(tiny("gemma3"), gw.PromptTuning(length=400))
    spread = model.get_input_embeddings()(torch.arange(99)).std()
    assert drawn.std() == pytest.approx(spread.item(), rel=0.1)


def test_a_file_keeps_the_prompt_and_not_where_it_started(tmp_path: Path) -> None:
    model = tiny("llama")
    prompt = prompt_of(model, gw.PromptTuning(length=2, init="text", ids=(4, 5)))
    gw.save(model, tmp_path)
    loaded = gw.load(tiny("llama"), tmp_path)
    assert loaded.techniques == (gw.PromptTuning(length=2),)
    assert torch.equal(next(loaded.parameters()), prompt)


def test_what_cannot_start_from_a_text_says_so() -> None:
    for kind in (gw.PromptTuning, gw.MultitaskPromptTuning):
        for alone in (kind(init="text"), kind(text="w1"), kind(ids=(1,))):
            with pytest.raises(BadOption, match="belong together"):
                gw.attach(tiny("llama"), alone)
        with pytest.raises(BadOption, match="tokenized"):
            gw.attach(tiny("llama"), kind(init="text", text="w1"))
    with pytest.raises(BadOption, match="not in the vocabulary of 99"):
        gw.attach(tiny("llama"), gw.PromptTuning(init="text", ids=(1, 99)))
    with pytest.raises(BadOption, match="no vocabulary"):
        gw.attach(tiny("vit"), gw.PromptTuning(init="text", ids=(1,)))


@pytest.mark.parametrize("kind", ["prompt-tuning", "multitask-prompt-tuning"])
def test_a_recipe_uses_the_tokenizer_of_its_base(kind: str, tokenizer: Any) -> None:
    technique = gw.make(kind, {"length": 4, "init": "text", "text": "w3 w5"})
    materials = Materials(make_task("causal-lm"), tiny("llama"), tokenizer, {})
    assert technique.tokenized(materials.ids).ids == (3, 5)  # type: ignore[attr-defined]
    images = Materials(make_task("image-classification"), tiny("vit"), None, {})
    with pytest.raises(BadRecipe, match="reads no text"):
        technique.tokenized(images.ids)
