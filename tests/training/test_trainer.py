"""The trainer against plain PyTorch: slices of a batch, resuming, what a checkpoint holds."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from graftwork.tasks.base import IGNORED, Encoded
from graftwork.tasks.registry import make_task
from graftwork.testing import tiny
from graftwork.training import checkpoints, states
from graftwork.training.groups import grouped
from graftwork.training.journal import Journal, Recorder
from graftwork.training.materials import Materials
from graftwork.training.run import make_trainer, scores_on
from graftwork.training.trainer import Trainer

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
TASK = make_task("text-classification", {"labels": ["no", "yes"]})


class Tokenizer:
    pad_token_id = 0


def items(count: int, seed: int = 0) -> Encoded:
    """Rows of three to nine tokens; the label is whether the first token is even."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 10, (), generator=generator))
        ids = torch.randint(3, 99, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": ids[0] % 2})
    return Encoded(rows)


def biases_only(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or name.startswith("classifier"))
    return model


def classifier() -> nn.Module:
    return biases_only(tiny("bert-classification", {"num_labels": 2}))


def trainer(
    folder: Path, model: nn.Module, rows: int = 32, patience: int | None = None, **options
) -> Trainer:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "metric_for_best_model": "accuracy",
        "greater_is_better": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    materials = Materials(TASK, model, Tokenizer(), {"train": items(rows), "validation": items(16, seed=1)})
    return make_trainer(
        materials,
        args=TrainingArguments(**{**defaults, **options}),
        patience=patience,
        groups=lambda model: grouped(model, lambda _: 1.0, 0.0),
        callbacks=[Recorder(Journal(folder / "metrics.jsonl"))],
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in states.trained(model).items()}


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in Journal(folder / "metrics.jsonl").records() if "loss" in record]


def plain_training(model: nn.Module, steps: int, micro: int) -> list[float]:
    """AdamW over the same batches, each taken as a whole, written out by hand."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
    collate = TASK.collator(Tokenizer())
    found = []
    for step in range(steps):
        batch = collate([items(32)[n] for n in ORDER[step * micro : (step + 1) * micro]])
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        optimizer.step()
        found.append(loss.item())
    return found


ORDER = list(range(32))


@pytest.fixture
def in_order(monkeypatch) -> None:
    """Rows in their own order, so that a loop written by hand sees the same batches; no dropout."""
    monkeypatch.setattr(
        Trainer,
        "_get_train_sampler",
        lambda self, rows=None: torch.utils.data.SequentialSampler(rows or self.train_dataset),
    )


def undropped() -> nn.Module:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2}
    return biases_only(tiny("bert-classification", quiet))


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_slices_do_not_change_the_gradient(tmp_path: Path, in_order, slices: int) -> None:
    """Rows differ in length and slices in padding; the steps equal those of a loop written by hand."""
    model = undropped()
    trainer(
        tmp_path,
        model,
        max_steps=4,
        per_device_train_batch_size=8 // slices,
        gradient_accumulation_steps=slices,
        eval_strategy="no",
        metric_for_best_model=None,
    ).train()
    reference = undropped()
    expected = plain_training(reference, 4, 8)
    assert losses(tmp_path) == pytest.approx(expected, abs=2e-6)
    for name, tensor in weights(model).items():
        if "key.bias" not in name:  # softmax ignores it: its gradient is rounding, which Adam blows up
            torch.testing.assert_close(tensor, weights(reference)[name], atol=2e-5, rtol=1e-4)


def test_a_slice_without_counted_labels_is_no_nan(tmp_path: Path) -> None:
    found = trainer(tmp_path, classifier())
    batch = TASK.collator(Tokenizer())([items(2)[0]])
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    model = found.model.train()
    loss = found.compute_loss(model, batch, num_items_in_batch=torch.tensor(5))
    assert loss.item() == 0.0
    loss.backward()
    assert all(p.grad is None or torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


@pytest.mark.parametrize("rows", [32, 30])
@pytest.mark.parametrize("slices", [1, 2])
def test_resuming_from_any_checkpoint_ends_bitwise_the_same(tmp_path: Path, rows: int, slices: int) -> None:
    """Dropout on, rows shuffled, epochs that end inside a batch, checkpoints inside and between epochs."""
    options = {"per_device_train_batch_size": 8 // slices, "gradient_accumulation_steps": slices}
    model = classifier()
    kept = []
    whole = trainer(tmp_path / "whole", model, rows, **options)
    save = whole._save_checkpoint

    def keeping(*args) -> None:
        save(*args)
        newest = checkpoints.latest(tmp_path / "whole")
        kept.append(shutil.copytree(newest, tmp_path / "kept" / newest.name))

    whole._save_checkpoint = keeping
    whole.train()
    assert len(kept) >= 3
    for checkpoint in kept[:-1]:
        other = classifier()
        torch.manual_seed(999)
        resumed = trainer(tmp_path / f"from-{checkpoint.name}", other, rows, **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        for name, tensor in weights(model).items():
            assert torch.equal(tensor, weights(other)[name]), (checkpoint.name, name)
        after = losses(tmp_path / f"from-{checkpoint.name}")
        assert after == losses(tmp_path / "whole")[-len(after) :]


def test_a_checkpoint_holds_what_is_trained_and_no_pickle(tmp_path: Path) -> None:
    model = classifier()
    trainer(tmp_path, model).train()
    folder = checkpoints.latest(tmp_path)
    assert {file.name for file in folder.iterdir()} == {
        "state.safetensors",
        "state.json",
        "trainer_state.json",
    }
    names = set(checkpoints.read(folder).tensors)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.removeprefix("trained/") for n in names if n.startswith("trained/")} == trained
    assert {
        n.removeprefix("optimizer/").partition("|")[0] for n in names if n.startswith("optimizer/")
    } <= trained


def test_best_and_newest_checkpoint_stay(tmp_path: Path) -> None:
    found = trainer(tmp_path, classifier())
    found.train()
    kept = {checkpoints.step_of(folder) for folder in checkpoints.whole(tmp_path)}
    assert kept == {found.state.best_global_step, found.state.global_step}


def test_patience(tmp_path: Path) -> None:
    found = trainer(tmp_path, classifier(), patience=2, learning_rate=1e-12, max_steps=40)
    found.train()
    assert found.state.best_global_step == 2
    assert found.state.global_step == 6
    assert found.out_of_patience()


def test_running_statistics_of_the_base_stay(tmp_path: Path) -> None:
    model = tiny("resnet")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    task = make_task("image-classification", {"labels": [str(n) for n in range(5)]})
    rows = Encoded([{"pixel_values": torch.randn(3, 16, 16), "labels": n % 5} for n in range(8)])
    Trainer(
        task=task,
        model=model,
        groups=lambda m: grouped(m, lambda _: 1.0, 0.0),
        patience=None,
        train_dataset=rows,
        data_collator=lambda batch: {
            k: torch.stack([torch.as_tensor(i[k]) for i in batch]) for k in batch[0]
        },
        args=TrainingArguments(
            str(tmp_path), max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no"
        ),
    ).train()
    assert all(torch.equal(buffers[n], b) for n, b in model.named_buffers())


def test_groups() -> None:
    model = nn.ModuleDict({"down": nn.Linear(2, 3), "up": nn.Linear(3, 2)})
    model["down"].bias.requires_grad_(False)
    found = grouped(model, lambda name: 16.0 if name.startswith("up") else 1.0, 0.1)
    sizes = {(g.factor, g.weight_decay): sum(p.numel() for p in g.parameters) for g in found}
    assert sizes == {(1.0, 0.1): 6, (16.0, 0.1): 6, (16.0, 0.0): 2}
    assert found[0].factor == 1.0


def test_the_loss_of_an_evaluation_is_the_mean_over_its_labels(tmp_path: Path) -> None:
    """Batches of 8, 8 and 3 rows with unequal numbers of tokens against all rows at once."""
    rows = [{**item, "labels": item["input_ids"]} for item in items(19, seed=5)]
    task = make_task("causal-lm")
    model = tiny("llama").eval()
    batch = task.collator(Tokenizer())(rows)
    counted = batch["labels"][:, 1:] != IGNORED
    with torch.no_grad():
        scores = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits[:, :-1]
    wanted = nn.functional.cross_entropy(scores[counted].double(), batch["labels"][:, 1:][counted])
    made = make_trainer(
        Materials(task, model, Tokenizer(), {}),
        args=TrainingArguments(
            output_dir=str(tmp_path), per_device_eval_batch_size=8, remove_unused_columns=False,
            label_names=["labels"], report_to="none", use_cpu=True, disable_tqdm=True,
        ),
        patience=None,
        groups=lambda _: (),
    )  # fmt: skip
    scores = scores_on(made, Encoded(rows))
    assert scores["loss"] == pytest.approx(wanted.item(), rel=1e-6)
    assert scores["perplexity"] == pytest.approx(wanted.exp().item(), rel=1e-5)
