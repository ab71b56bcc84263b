"""A lean host in a recipe changes bytes, not the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftwork.training.recipe import Recipe
from graftwork.training.run import tune


@pytest.fixture
def host(tmp_path: Path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<pad>", "<unk>", "<eos>", "a", "b", "c", "d", "e"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "host")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "host")
    return str(tmp_path / "host")


@pytest.mark.slow
def test_a_lean_run_ends_where_a_plain_one_does(host: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join("abcde"[(i * j) % 5] for j in range(1, 30)) for i in range(40)))
    losses = []
    for lean in (False, True):
        recipe = Recipe.of(
            {
                "model": host,
                "technique": {"name": "lora", "rank": 2, "workspaces": ["all-linear"]},
                "task": {"name": "causal-lm", "max_length": 16},
                "data": {"train": str(text)},
                "training": {"steps": 6, "batch_size": 4, "lean": lean, "learning_rate": 1e-2},
                "output": str(tmp_path / f"run-{lean}"),
            }
        )
        losses.append(tune(recipe).scores["validation"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
