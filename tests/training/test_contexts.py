"""Recipes with several contexts: what is refused, and runs that are what the same steps in code are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupted import numbers, tune_until
from PIL import Image
from safetensors.torch import load_file
from test_distributed import launch
from tiny_runs import recipe_values, save_rows
from torch.optim import AdamW
from transformers import set_seed

import graftwork as gw
from graftwork.cli.merge import merge
from graftwork.data.readers import read_rows
from graftwork.errors import BadFile, BadRecipe, StateError
from graftwork.models.base import load_base
from graftwork.models.pair import load_pair
from graftwork.routing import ByToken
from graftwork.tasks.captioning import Captioning
from graftwork.training.evaluate import evaluate
from graftwork.training.folder import RunFolder
from graftwork.training.joined import load_connector
from graftwork.training.recipe import Recipe
from graftwork.training.result import RunResult
from graftwork.training.run import tune
from graftwork.training.subject import open_subject
from small_bases import save_host, save_pair

LORA = {"name": "lora", "rank": 2, "workspaces": ["text.attention.query", "text.attention.value"]}
IA3 = {"name": "ia3", "workspaces": ["text.attention.key", "text.attention.value"]}
CONTEXTS = {"image": {"tokens": "<image>", "technique": IA3}, "text": "others"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `vision/`, `text/`, and pictures whose one word says how light they are."""
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder)
    for part, count in (("train", 24), ("dev", 8)):
        save_pictures(folder / part, count)
    return folder


def save_pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    lines = []
    for number in range(count):
        light, file = number % 2, folder / f"{number}.png"
        Image.fromarray(np.full((8, 8), 30 + 200 * light + number % 20, dtype=np.uint8)).save(file)
        lines.append(f'{{"image": "{file}", "caption": "w{1 + light} w{3 + light} w9"}}\n')
    folder.with_suffix(".jsonl").write_text("".join(lines))


def values(pair: Path, output: Path, **training: Any) -> dict[str, Any]:
    steps = {"steps": 6, "batch_size": 8, "learning_rate": 1e-2, "evaluate_every": 3, "save_every": 2}
    return {
        "model": {"vision": str(pair / "vision"), "text": str(pair / "text")},
        "technique": LORA,
        "contexts": CONTEXTS,
        "task": "captioning",
        "data": {"train": str(pair / "train.jsonl"), "validation": str(pair / "dev.jsonl")},
        "training": {**steps, "log_every": 1, **training},
        "output": str(output),
    }


@pytest.fixture(scope="module")
def finished(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    tune(Recipe.of(values(pair, output, context_dropout=0.2)))
    return output


# What a recipe may say


def refusal(*overrides: str, **changes: Any) -> str:
    base = {
        "model": {"vision": "tiny-vit", "text": "tiny-llama"},
        "technique": LORA,
        "contexts": CONTEXTS,
        "task": "captioning",
        "data": {"train": "digits:captions"},
        "output": "runs/x",
    }
    given = {key: value for key, value in {**base, **changes}.items() if value is not None}
    with pytest.raises(BadRecipe) as caught:
        Recipe.of(given, overrides)
    return str(caught.value).partition("\n")[2].strip()


def test_short_forms(pair: Path, tmp_path: Path) -> None:
    recipe = Recipe.of(values(pair, tmp_path))
    assert recipe.contexts is not None
    assert [(name, context.tokens) for name, context in recipe.contexts.items()] == [
        ("image", ["<image>"]),
        ("text", "others"),
    ]
    assert {name: [t.name for t in ts] for name, ts in recipe.adapters().items()} == {
        "image": ["ia3"],
        "text": ["lora"],
    }
    assert [t.name for t in recipe.techniques()] == ["ia3", "lora"]
    assert recipe.model.title == f"{pair / 'vision'} + {pair / 'text'}"
    assert Recipe.of(recipe.resolved()) == recipe


def test_overrides_reach_into_contexts(pair: Path, tmp_path: Path) -> None:
    given = {
        **values(pair, tmp_path),
        "contexts": {"image": "<image>", "text": {"tokens": "others", "technique": "lora"}},
    }
    overrides = [
        "contexts.image.technique=ia3",
        "contexts.text.technique.rank=3",
        "contexts.text.tokens=[w1, 7]",
    ]
    del given["technique"]
    recipe = Recipe.of(given, overrides)
    assert recipe.contexts is not None
    assert recipe.contexts["text"].tokens == ["w1", 7]
    assert recipe.adapters()["text"][0].options() == {"rank": 3}
    assert recipe.adapters()["image"][0].name == "ia3"


@pytest.mark.parametrize(
    ("contexts", "words"),
    [
        ({}, "contexts: name at least one"),
        ({"a": []}, "contexts.a.tokens: name a token, or others"),
        ({"a": ["w1", "others"]}, "contexts.a.tokens: 'others' is no token"),
        ({"a": True}, "contexts.a.tokens: True is no token"),
        ({"a": None}, "contexts.a.tokens: None is no token"),
        ({"a": [3, 3]}, "contexts.a.tokens: 3 is listed twice"),
        ({"a": 3, "b": [4, 3]}, "contexts: 3 is listed twice"),
        ({"a": "others", "b": "others"}, "contexts: several take others"),
        ({"a": 3, "A": 4}, "contexts: a and A would be one file"),
        ({"../a": 3}, "contexts: adapter name '../a' cannot be a file name"),
        ({"a": {"tokns": 3}}, "contexts.a.tokns: there is no such key. Did you mean contexts.a.tokens"),
        ({"a": {"tokens": 3, "technique": "lorra"}}, "Did you mean lora"),
        (
            {"a": {"tokens": 3, "technique": "prefix-tuning"}, "b": 4},
            "contexts.a: prefix-tuning does not treat tokens one by",
        ),
        ({"a": {"tokens": 3, "technique": "ia3"}}, "technique: every context has one of its own"),
    ],
    ids=str,
)
def test_contexts_that_mean_nothing_are_refused(contexts: dict[str, Any], words: str) -> None:
    assert words in refusal(contexts=contexts)


def test_contexts_and_the_rest_of_the_recipe_must_agree() -> None:
    other: dict[str, Any] = {"model": "tiny-vit", "task": "image-classification"}
    assert "they serve tokens, and image-classification has none" in refusal(**other)
    assert "contexts.text.technique: missing" in refusal(technique=None)
    assert "technique: missing" in refusal(technique=None, contexts=None)
    assert "there are no contexts to drop" in refusal("training.context_dropout=0.1", contexts=None)
    assert "training.context_dropout" in refusal("training.context_dropout=1")
    assert "Did you mean contexts" in refusal("context.image=3")


def test_a_model_of_two_is_both_and_reads_images() -> None:
    assert "model: give a name, or vision and text" in refusal(model={"vision": "tiny-vit"})
    assert "model: give a name, or vision and text" in refusal("model.name=minilm")
    assert "model: quantised takes a model of one name" in refusal("model.quantised=nf4")
    assert "causal-lm is no task for one: take captioning" in refusal(task="causal-lm")
    assert "Did you mean model.vision" in refusal("model.vison=tiny-vit")


# What the base and the data must have


@pytest.mark.parametrize(
    ("contexts", "words"),
    [
        (
            {"a": "ww9", "text": "others"},
            r"contexts.a.tokens: 'ww9' is not in the vocabulary of 100. Did you mean .*w9",
        ),
        (
            {"a": "[w]", "text": "others"},
            r"'\[w\]' is not in the vocabulary of 100; the tokenizer reads it as \[",
        ),
        (
            {"a": 10**6, "text": "others"},
            "contexts.a.tokens: 1000000 is no token's number; they go from 0 to",
        ),
        ({"a": "w1", "b": 6}, "contexts.b.tokens: 6 is token 6, which is listed already"),
        ({"a": "w40", "text": "others"}, "contexts.a: none of its tokens is in the training rows"),
    ],
    ids=str,
)
def test_tokens_that_cannot_be_served_are_refused(
    contexts: dict[str, Any], words: str, pair: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadRecipe, match=words):
        tune(Recipe.of({**values(pair, tmp_path / "run"), "contexts": contexts}))


def test_sites_that_see_patches_are_refused(pair: Path, tmp_path: Path) -> None:
    given = {**values(pair, tmp_path / "run"), "technique": "lora"}
    with pytest.raises(
        BadRecipe,
        match=r"Every site of a context must see the row of tokens, and these are in the stacks text, vision",
    ):
        tune(Recipe.of(given))


@pytest.mark.slow
def test_bases_that_contexts_cannot_serve(stage: Path, tmp_path: Path) -> None:
    given = {**recipe_values(stage, tmp_path / "head"), "contexts": {"even": "w2", "rest": "others"}}
    with pytest.raises(BadRecipe, match=r"puts new parts on this base \(classifier\)"):
        tune(Recipe.of(given))
    save_host("t5", tmp_path / "t5")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"source": "w1 w2", "target": "w3"}\n' * 20)
    other = {"model": str(tmp_path / "t5"), "task": "seq2seq", "data": {"train": str(rows)}}
    with pytest.raises(BadRecipe, match="T5ForConditionalGeneration reads two rows of tokens"):
        tune(Recipe.of({**given, **other, "output": str(tmp_path / "two")}))


# Runs


def by_hand(pair: Path, steps: int) -> Any:
    """The same recipe in code: every row in each step."""
    set_seed(0)
    model, both = load_pair(str(pair / "vision"), str(pair / "text"))
    image = gw.attach(model, gw.IA3(workspaces=IA3["workspaces"]), name="image", head=False)
    text = gw.attach(model, gw.LoRA(rank=2, workspaces=LORA["workspaces"]), name="text", head=False)
    gw.trainable(model, "image", "text")
    gw.route(model, ["image", "text"], by=ByToken({model.config.image_token_id: 0}, other=1))
    model.connector.requires_grad_()
    task = Captioning()
    encoded = task.encode(read_rows(str(pair / "train.jsonl")), both)
    batch = task.collator(both)([encoded[n] for n in range(len(encoded))])
    trained = [*image.parameters(), *text.parameters(), *model.connector.parameters()]
    optimizer = AdamW(trained, lr=1e-3, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_a_run_is_the_same_thing_done_by_hand(pair: Path, tmp_path: Path) -> None:
    plain = {"schedule": "constant", "warmup": 0.0, "learning_rate": 1e-3, "batch_size": 24, "keep": "last"}
    result = tune(Recipe.of(values(pair, tmp_path / "run", steps=4, **plain)))
    wanted = by_hand(pair, 4)
    found, _ = open_subject(tmp_path / "run").load()
    own = sum(adapter.count() for adapter in gw.adapters(wanted).values())
    assert result.trainable == own + sum(p.numel() for p in wanted.connector.parameters())
    assert result.parameters == sum(p.numel() for p in wanted.parameters()) - result.trainable
    assert list(gw.adapters(found)) == ["image", "text"]
    for name, adapter in gw.adapters(wanted).items():
        for key, tensor in gw.adapters(found)[name].tensors().items():
            torch.testing.assert_close(tensor, adapter.tensors()[key], atol=2e-4, rtol=1e-3)
    for key, tensor in found.connector.state_dict().items():
        torch.testing.assert_close(tensor, wanted.connector.state_dict()[key], atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_what_a_run_of_contexts_leaves(finished: Path) -> None:
    assert sorted(file.name for file in (finished / "adapter").iterdir()) == [
        "image.safetensors",
        "text.safetensors",
    ]
    names = {file.name for file in finished.iterdir()}
    assert names == {
        "recipe.yaml",
        "metrics.jsonl",
        "adapter",
        "connector.safetensors",
        "curves.png",
        "card.md",
        "run.json",
    }
    card = (finished / "card.md").read_text()
    assert card.startswith("# image: IA3(")
    assert "+ text: LoRA(" in card
    assert any("eval_perplexity" in record for record in numbers(finished))


@pytest.mark.slow
def test_scoring_again_gives_the_same_with_the_route_set(finished: Path, pair: Path) -> None:
    result = RunResult.of(RunFolder(finished).facts(), "run.json")
    again = evaluate(finished)
    assert again == pytest.approx(result.scores["validation"], abs=1e-6)
    assert evaluate(finished, str(pair / "dev.jsonl"), batch_size=3) == pytest.approx(again, abs=1e-6)


@pytest.mark.slow
def test_saved_contexts_route_to_the_same_outputs(finished: Path, pair: Path) -> None:
    found, both = open_subject(finished).load()
    task = Captioning()
    encoded = task.encode(read_rows(str(pair / "dev.jsonl")), both)
    batch = task.collator(both)([encoded[n] for n in range(4)])
    routed = found.eval()(**batch).logits
    model, _ = load_pair(str(pair / "vision"), str(pair / "text"))
    load_connector(model, finished / "connector.safetensors")
    for name in ("text", "image"):
        gw.load(model, finished, name=name)
    index = (batch["input_ids"] == model.config.image_token_id).long()
    with gw.route(model, ["text", "image"], index):
        torch.testing.assert_close(model.eval()(**batch).logits, routed)
    with gw.active(model, "text"):
        assert (model(**batch).logits - routed).abs().max() > 1e-4


@pytest.mark.slow
def test_a_stopped_run_of_contexts_goes_on_exactly(
    finished: Path, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = values(pair, tmp_path / "stopped", context_dropout=0.2)
    tune_until(4, given, monkeypatch)
    assert tune(Recipe.of(given)).steps == 6
    assert numbers(tmp_path / "stopped") == numbers(finished)
    for file in ("adapter/image.safetensors", "adapter/text.safetensors", "connector.safetensors"):
        assert (tmp_path / "stopped" / file).read_bytes() == (finished / file).read_bytes()


@pytest.mark.slow
def test_one_adapter_on_a_model_of_two(pair: Path, tmp_path: Path) -> None:
    given = values(pair, tmp_path / "run")
    del given["contexts"]
    result = tune(Recipe.of(given))
    scores = pytest.approx(result.scores["validation"], abs=1e-6)
    assert evaluate(tmp_path / "run") == scores
    merge(str(tmp_path / "run"), tmp_path / "whole")
    host, both = load_base(str(tmp_path / "whole"), task="captioning")
    batch = Captioning().encode(read_rows(str(pair / "dev.jsonl")), both)
    found, _ = open_subject(tmp_path / "run").load()
    inputs = Captioning().collator(both)([batch[0], batch[1]])
    torch.testing.assert_close(host(**inputs).logits, found.eval()(**inputs).logits, atol=1e-5, rtol=1e-4)
    (tmp_path / "run" / "connector.safetensors").write_bytes(b"no tensors")
    with pytest.raises(BadFile, match="no connector of this model"):
        evaluate(tmp_path / "run")


@pytest.mark.slow
def test_contexts_on_a_captioners_own_folder_leave_its_connector(pair: Path, tmp_path: Path) -> None:
    model, both = load_pair(str(pair / "vision"), str(pair / "text"))
    model.save_pretrained(tmp_path / "host")
    both.save_pretrained(tmp_path / "host")
    result = tune(Recipe.of({**values(pair, tmp_path / "run"), "model": str(tmp_path / "host")}))
    assert not (tmp_path / "run" / "connector.safetensors").exists()
    assert evaluate(tmp_path / "run") == pytest.approx(result.scores["validation"], abs=1e-6)
    found, _ = open_subject(tmp_path / "run").load()
    for name, tensor in found.connector.state_dict().items():
        assert torch.equal(tensor, model.connector.state_dict()[name])
    assert result.trainable == sum(adapter.count() for adapter in gw.adapters(found).values())


@pytest.mark.slow
def test_contexts_are_not_merged(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"several contexts \(image, text\)"):
        merge(str(finished), tmp_path / "merged")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_processes_train_what_one_does(sharding: str, pair: Path, tmp_path: Path) -> None:
    steps = {"schedule": "constant", "warmup": 0.0, "learning_rate": 1e-3, "keep": "last"}
    tune(Recipe.of(values(pair, tmp_path / "one", **steps)))
    launch(Recipe.of(values(pair, tmp_path / "two", sharding=sharding, **steps)), tmp_path)
    for file in ("adapter/image.safetensors", "adapter/text.safetensors", "connector.safetensors"):
        one, two = (load_file(tmp_path / run / file) for run in ("one", "two"))
        torch.testing.assert_close(two, one, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_decoder_by_token_number(tmp_path: Path) -> None:
    save_host("gpt2", tmp_path / "host")
    save_rows(tmp_path / "rows.jsonl", 40, 0)
    recipe = {
        "model": str(tmp_path / "host"),
        "technique": {"name": "lora", "rank": 2},
        "contexts": {
            "first": {"tokens": list(range(5, 30))},
            "rest": {"tokens": "others", "technique": "bitfit"},
        },
        "task": "causal-lm",
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "training": {"steps": 3, "batch_size": 8, "evaluate_every": "never"},
        "output": str(tmp_path / "run"),
    }
    result = tune(Recipe.of(recipe))
    assert result.techniques == ("first: LoRA(rank=2)", "rest: BitFit()")
    assert evaluate(tmp_path / "run") == pytest.approx(result.scores["validation"], abs=1e-6)
