"""Whole runs on a tiny host: the run folder, evaluating again, refusals, composites, early stopping."""

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import recipe_values, save_host, save_rows

import graftwork as gw
import graftwork.adapters.store as store
from graftwork.engine.verbs import adapters
from graftwork.errors import BadData, BadOption, BadRecipe, PortUnavailable, StateError
from graftwork.models.base import load_base
from graftwork.training.evaluate import evaluate
from graftwork.training.folder import RunFolder
from graftwork.training.journal import Journal
from graftwork.training.recipe import Recipe
from graftwork.training.result import RunResult
from graftwork.training.run import tune

pytestmark = pytest.mark.slow


def run(stage: Path, output: Path, technique: object = None, **training: object) -> RunResult:
    values = recipe_values(stage, output, **training)
    return tune(Recipe.of(values if technique is None else {**values, "technique": technique}))


@pytest.fixture(scope="module")
def finished(stage: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    output = tmp_path_factory.mktemp("finished") / "run"
    return output, run(stage, output)


def test_public_names() -> None:
    assert (gw.tune, gw.evaluate, gw.Recipe) == (tune, evaluate, Recipe)


def test_what_a_run_folder_holds(finished: tuple[Path, RunResult]) -> None:
    output, result = finished
    names = {file.name for file in output.iterdir()}
    assert names == {"recipe.yaml", "metrics.jsonl", "adapter", "curves.png", "card.md", "run.json"}
    records = Journal(output / "metrics.jsonl").records()
    assert {"step", "loss", "lr", "seconds"} <= records[0].keys()
    assert any("eval_accuracy" in record for record in records)
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)
    assert RunResult.of(json.loads((output / "run.json").read_text()), "run.json") == result
    assert (output / "curves.png").stat().st_size > 5000
    card = (output / "card.md").read_text()
    assert f"{result.trainable:,}" in card
    assert "LoRA(rank=2, dropout=0.1, up_rate=4.0)" in card


def test_facts_of_a_run(stage: Path, finished: tuple[Path, RunResult]) -> None:
    output, result = finished
    sites, width, rank, labels = 4, 32, 2, 2
    head = labels * width + labels
    assert result.trainable == sites * rank * 2 * width + head
    host, _ = load_base(str(stage / "host"), task="text-classification", labels=2)
    assert result.parameters == sum(p.numel() for p in host.parameters())
    assert result.steps == 9
    assert result.file_bytes == sum(f.stat().st_size for f in (output / "adapter").iterdir())
    assert result.examples == {"train": 48, "validation": 24}
    assert result.flops_per_step > 0
    assert result.peak_bytes > 10_000_000
    assert result.seconds_per_step > 0


def test_the_kept_state_is_the_best_evaluation(finished: tuple[Path, RunResult]) -> None:
    output, result = finished
    records = [r for r in Journal(output / "metrics.jsonl").records() if "eval_accuracy" in r]
    best = max(record["eval_accuracy"] for record in records)
    first = next(record for record in records if record["eval_accuracy"] == best)
    assert result.kept_step == first["step"]
    assert result.score == best
    assert result.scores["validation"]["loss"] == pytest.approx(first["eval_loss"], abs=1e-6)


def test_the_resolved_recipe_runs_identically(finished: tuple[Path, RunResult], tmp_path: Path) -> None:
    output, result = finished
    again = tune(Recipe.load(output / "recipe.yaml", [f"output={tmp_path / 'again'}"]))
    assert again.scores == result.scores
    one = (output / "adapter" / "default.safetensors").read_bytes()
    assert (tmp_path / "again" / "adapter" / "default.safetensors").read_bytes() == one


def test_evaluating_again_gives_the_same_scores(finished: tuple[Path, RunResult], stage: Path) -> None:
    output, result = finished
    expected = pytest.approx(result.scores["validation"], abs=1e-6)
    assert evaluate(output) == expected
    assert evaluate(output, str(stage / "dev.jsonl"), batch_size=8) == expected
    found = evaluate(
        output / "adapter",
        str(stage / "dev.jsonl"),
        model=str(stage / "host"),
        task="text-classification",
    )
    assert found == expected
    assert evaluate(output, limit=5) != expected
    with pytest.raises(BadOption, match="--model and --task"):
        evaluate(output / "adapter", str(stage / "dev.jsonl"))
    with pytest.raises(BadOption, match="--data"):
        evaluate(output / "adapter", model=str(stage / "host"), task="text-classification")
    with pytest.raises(BadData, match="no part 'test'"):
        evaluate(output, split="test")


def test_evaluation_scores_are_the_models_own(finished: tuple[Path, RunResult], stage: Path) -> None:
    """Accuracy counted by hand from the loaded adapter's logits."""
    output, result = finished
    model, tokenizer = load_base(str(stage / "host"), task="text-classification", labels=["even", "odd"])
    store.load(model, output / "adapter")
    rows = [json.loads(line) for line in (stage / "dev.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        logits = model.eval()(**tokenizer(row["text"], return_tensors="pt")).logits
        right += ["even", "odd"][int(logits.argmax())] == row["label"]
    assert right / len(rows) == pytest.approx(result.score)


def test_a_finished_run_is_not_overwritten_by_accident(finished: tuple[Path, RunResult]) -> None:
    output, result = finished
    recipe = Recipe.load(output / "recipe.yaml")
    before = (output / "run.json").read_bytes()
    with pytest.raises(StateError, match="finished run"):
        tune(recipe)
    assert tune(recipe, resume=True) == result
    assert (output / "run.json").read_bytes() == before


def test_several_techniques_make_one_adapter(stage: Path, tmp_path: Path) -> None:
    techniques = [{"name": "lora", "rank": 2}, "ia3"]
    result = run(stage, tmp_path / "run", techniques, steps=2)
    assert result.techniques == ("LoRA(rank=2)", "IA3()", "FineTuning(workspaces=['head'])")
    model, _ = load_base(str(stage / "host"), task="text-classification", labels=2)
    store.load(model, tmp_path / "run" / "adapter")
    assert [t.name for t in adapters(model)["default"].techniques] == ["lora", "ia3", "fine-tuning"]


@pytest.mark.parametrize("workspaces", [["head"], ["*"]])
def test_probe_and_full_fine_tuning_are_techniques(
    stage: Path, tmp_path: Path, workspaces: list[str]
) -> None:
    result = run(stage, tmp_path / "run", {"name": "fine-tuning", "workspaces": workspaces}, steps=2)
    host, _ = load_base(str(stage / "host"), task="text-classification", labels=2)
    head = sum(p.numel() for p in host.classifier.parameters())
    assert result.trainable == (head if workspaces == ["head"] else sum(p.numel() for p in host.parameters()))


def test_patience_ends_a_run(stage: Path, tmp_path: Path) -> None:
    result = run(stage, tmp_path / "run", learning_rate=1e-12, epochs=20, evaluate_every=1, patience=2)
    assert result.stopped_early
    assert (result.kept_step, result.steps) == (1, 3)


def test_without_evaluation_the_last_state_is_kept(stage: Path, tmp_path: Path) -> None:
    result = run(stage, tmp_path / "run", evaluate_every="never", save_every="never", steps=3)
    assert (result.kept_step, result.steps) == (3, 3)
    assert "accuracy" in result.scores["validation"]


@pytest.mark.parametrize(
    "training", [{"precision": "bf16"}, {"checkpointing": True}, {"schedule": "cosine", "weight_decay": 0.1}]
)
def test_options_train(stage: Path, tmp_path: Path, training: dict[str, object]) -> None:
    result = run(stage, tmp_path / "run", **training)
    losses = [r["loss"] for r in Journal(tmp_path / "run" / "metrics.jsonl").records() if "loss" in r]
    assert all(loss == loss for loss in losses)
    assert result.steps == 9


def test_checkpointing_changes_no_number(stage: Path, tmp_path: Path) -> None:
    """Without dropout, recomputed activations give the same losses as kept ones."""
    technique = {"name": "lora", "rank": 2}
    found = []
    for checkpointing in (False, True):
        output = tmp_path / str(checkpointing)
        run(stage, output, technique, checkpointing=checkpointing, log_every=1, steps=4)
        found.append([r["loss"] for r in Journal(output / "metrics.jsonl").records() if "loss" in r])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="an accelerator can do fp16")
def test_fp16_without_an_accelerator_is_refused(stage: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="fp16 needs an accelerator"):
        run(stage, tmp_path / "run", precision="fp16")
    with pytest.raises(BadRecipe, match="torchrun"):
        run(stage, tmp_path / "other", sharding="fsdp2")


@pytest.mark.parametrize(
    ("family", "task"), [("gpt2", "causal-lm"), ("t5", "seq2seq"), ("bert", "masked-lm")]
)
def test_language_tasks(tmp_path: Path, family: str, task: str) -> None:
    stage = tmp_path
    save_host(family, stage / "host")
    save_rows(stage / "train.jsonl", 24, 0)
    save_rows(stage / "dev.jsonl", 8, 1)
    values = recipe_values(stage, tmp_path / "run", steps=2, evaluate_every=2)
    columns = {"source": "text", "target": "label"} if task == "seq2seq" else {"text": "text"}
    data = {**values["data"], "columns": columns}  # type: ignore[dict-item]
    result = tune(Recipe.of({**values, "task": task, "data": data, "technique": "lora"}))
    assert result.best_metric in result.scores["validation"]
    assert RunFolder(tmp_path / "run").finished


def test_what_the_base_lacks_is_trained_and_saved(tmp_path: Path) -> None:
    """A masked language model has no pooler: the random one in its place is not lost after training."""
    save_host("bert", tmp_path / "host")
    save_rows(tmp_path / "train.jsonl", 24, 0)
    save_rows(tmp_path / "dev.jsonl", 24, 1)
    result = run(tmp_path, tmp_path / "run", steps=2)
    assert "pooler" in result.techniques[1]
    assert result.techniques[2] == "FineTuning(workspaces=['head'])"
    torch.manual_seed(123)
    assert evaluate(tmp_path / "run") == pytest.approx(result.scores["validation"], abs=1e-6)


def test_a_lean_host_changes_no_loss_and_is_refused_where_it_does_nothing(tmp_path: Path) -> None:
    save_host("llama", tmp_path / "host")
    save_rows(tmp_path / "train.jsonl", 24, 0)
    save_rows(tmp_path / "dev.jsonl", 8, 1)
    found = []
    for lean in (False, True):
        output = tmp_path / f"lean-{lean}"
        values = recipe_values(tmp_path, output, steps=3, log_every=1, evaluate_every=3, lean=lean)
        data = {**values["data"], "columns": {"text": "text"}}  # type: ignore[dict-item]
        tune(Recipe.of({**values, "task": "causal-lm", "technique": "lora", "data": data}))
        found.append([r["loss"] for r in Journal(output / "metrics.jsonl").records() if "loss" in r])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    save_host("bert-base", tmp_path / "host")
    with pytest.raises(PortUnavailable, match="keep less"):
        run(tmp_path, tmp_path / "bert", lean=True)
