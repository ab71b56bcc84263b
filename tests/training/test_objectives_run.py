"""Objectives in a recipe: what is refused, what is logged, slices of a batch, a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import TASK, Tokenizer, items
from tiny_runs import recipe_values, save_host
from torch import nn
from transformers import TrainingArguments

import graftwork as gw
from graftwork.errors import BadRecipe
from graftwork.objectives import Consistency, Objective, Objectives, Orthogonality
from graftwork.tasks.registry import make_task
from graftwork.testing import tiny
from graftwork.training.groups import grouped
from graftwork.training.journal import Journal, Recorder
from graftwork.training.materials import Materials
from graftwork.training.recipe import Recipe
from graftwork.training.run import make_trainer, tune

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
BASE: dict[str, Any] = {
    "model": "minilm",
    "technique": "lora",
    "task": "text-classification",
    "data": {"train": "docstrings:subjects"},
    "output": "runs/x",
}
TERMS: list[Objective] = [Consistency(weight=0.3, temperature=2), Orthogonality(weight=0.01)]


def refusal(*objectives: Any) -> str:
    with pytest.raises(BadRecipe) as caught:
        Recipe.of({**BASE, "objectives": list(objectives)}, origin="my.yaml")
    return str(caught.value)


def test_objectives_of_a_recipe() -> None:
    recipe = Recipe.of(
        {**BASE, "objectives": [{"name": "consistency", "weight": 0.15, "temperature": 2}]},
        ["objectives.0.weight=0.2"],
    )
    assert recipe.terms() == [Consistency(weight=0.2, temperature=2)]
    assert Recipe.of(recipe.resolved()) == recipe
    assert Recipe.of(BASE).terms() == []


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"name": "consistancy", "weight": 1}, ("objectives.0:", "consistency")),
        ({"name": "consistency", "weight": 1, "temprature": 2}, ("objectives.0:", "temperature")),
        ("consistency", ("objectives.0:", "needs weight")),
        ({"name": "diversity", "weight": -1}, ("objectives.0:", "at least 0")),
        ({"weight": 1}, ("objectives.0.name: missing",)),
    ],
)
def test_what_is_refused_names_the_place_and_the_nearest(objective: Any, words: tuple[str, ...]) -> None:
    text = refusal(objective)
    assert all(word in text for word in words), text


def test_a_kind_given_twice_is_refused() -> None:
    assert "given twice: diversity" in refusal(
        {"name": "diversity", "weight": 1}, {"name": "diversity", "weight": 2}
    )


def adapted() -> nn.Module:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2}
    model = tiny("bert-classification", quiet)
    torch.manual_seed(3)
    adapter = gw.attach(model, gw.LoRA(rank=2))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def trained(folder: Path, slices: int, terms: list[Objective]) -> tuple[nn.Module, list[dict[str, float]]]:
    model = adapted()
    make_trainer(
        Materials(TASK, model, Tokenizer(), {"train": items(32)}),
        args=TrainingArguments(
            str(folder),
            per_device_train_batch_size=8 // slices,
            gradient_accumulation_steps=slices,
            max_steps=4,
            learning_rate=1e-2,
            logging_steps=2,
            save_strategy="no",
            remove_unused_columns=False,
            label_names=["labels"],
            disable_tqdm=True,
            report_to="none",
            use_cpu=True,
        ),
        patience=None,
        objectives=Objectives(model, terms) if terms else None,
        groups=lambda model: grouped(model, lambda _: 1.0, 0.0),
        callbacks=[Recorder(Journal(folder / "metrics.jsonl"))],
    ).train()
    records = Journal(folder / "metrics.jsonl").records()
    return model, [record for record in records if "loss" in record]


def test_slices_change_neither_the_steps_nor_the_parts(tmp_path: Path) -> None:
    """Terms that are means of rows, and terms of the weights, count alike however a batch is cut."""
    whole, records = trained(tmp_path / "1", 1, TERMS)
    assert set(records[0]) >= {"loss_task", "loss_consistency", "loss_orthogonality"}
    for slices in (2, 4):
        other, cut = trained(tmp_path / str(slices), slices, TERMS)
        for one, two in zip(records, cut, strict=True):
            for key in ("loss", "loss_task", "loss_consistency", "loss_orthogonality"):
                assert one[key] == pytest.approx(two[key], rel=1e-4), key
        for (name, one), two in zip(
            gw.adapters(whole)["default"].named_parameters(),
            gw.adapters(other)["default"].parameters(),
            strict=True,
        ):
            if "query.bias" not in name:
                torch.testing.assert_close(one, two, atol=5e-5, rtol=1e-3)


def test_the_logged_parts_make_the_logged_loss(tmp_path: Path) -> None:
    _, records = trained(tmp_path, 2, TERMS)
    for record in records:
        parts = record["loss_task"] + 0.3 * record["loss_consistency"] + 0.01 * record["loss_orthogonality"]
        assert record["loss"] == pytest.approx(parts, rel=1e-4)


def test_terms_of_weight_0_train_bit_for_bit_like_none(tmp_path: Path) -> None:
    ends = []
    for number, terms in enumerate(([], [Consistency(weight=0)])):
        model, _ = trained(tmp_path / str(number), 1, terms)
        ends.append(gw.adapters(model)["default"].tensors())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_from_a_recipe(stage: Path, tmp_path: Path) -> None:
    objectives = [
        {"name": "consistency", "weight": 0.1, "temperature": 2, "schedule": "cosine"},
        {"name": "diversity", "weight": 0.03, "schedule": "two-phase"},
    ]
    recipe = Recipe.of({**recipe_values(stage, tmp_path / "run"), "objectives": objectives})
    tune(recipe)
    records = [r for r in Journal(tmp_path / "run" / "metrics.jsonl").records() if "loss" in r]
    assert all("loss_consistency" in record for record in records)
    assert "loss_diversity" not in records[0]
    assert "loss_diversity" in records[-1]
    assert Recipe.load(tmp_path / "run" / "recipe.yaml").terms() == recipe.terms()


def test_a_lean_run_keeps_its_logits_where_a_term_reads_them(stage: Path, tmp_path: Path) -> None:
    values = recipe_values(stage, tmp_path / "run", lean=True, steps=2)
    host = save_host("llama", tmp_path / "host")
    recipe = Recipe.of(
        {
            **values,
            "model": str(host),
            "task": {"name": "causal-lm", "max_length": 16},
            "objectives": [{"name": "consistency", "weight": 0.1}],
        }
    )
    tune(recipe)
    records = Journal(tmp_path / "run" / "metrics.jsonl").records()
    assert any("loss_consistency" in record for record in records)


def test_slices_of_a_gpt2_count_the_labels_that_its_loss_counts(tmp_path: Path) -> None:
    """Its first label predicts nothing: a slice's share is that of the rows in its mean."""
    model = tiny("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    gw.attach(model, gw.LoRA(rank=2))
    task = make_task("causal-lm")
    found = make_trainer(
        Materials(task, model, Tokenizer(), {}),
        args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
        patience=None,
        groups=lambda _: (),
    )
    short, long = torch.arange(3, 6)[None], torch.arange(3, 13)[None]
    slices = [{"input_ids": ids, "labels": ids} for ids in (short, long)]
    total = found._get_num_items_in_batch(slices, torch.device("cpu"))
    assert total.item() == 2 + 9
    losses = [found.compute_loss(model.train(), part, num_items_in_batch=total) for part in slices]
    expected = [model(**part).loss * share / 11 for part, share in zip(slices, (2, 9), strict=True)]
    torch.testing.assert_close(sum(losses), sum(expected), rtol=1e-6, atol=0)
