"""A recipe's training section as transformers' arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from graftwork.errors import BadRecipe
from graftwork.tasks.base import Task
from graftwork.training.recipe import Training

EVALUATION_BATCH = 64


def training_arguments(training: Training, task: Task, folder: Path, processes: int) -> TrainingArguments:
    """Arguments for a run in `folder`; raises BadRecipe where this machine cannot do what is asked."""
    _refuse_impossible(training, processes)
    options: dict[str, Any] = _interval("eval", training.evaluate_every)
    options |= _interval("save", training.save_every)
    options |= _checkpointing(training.checkpointing)
    if training.sharding == "fsdp2":
        options |= {"fsdp": True, "fsdp_config": {"version": 2}}
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        max_steps=training.steps or -1,
        per_device_train_batch_size=training.batch_size // (processes * training.accumulation),
        per_device_eval_batch_size=min(training.batch_size, EVALUATION_BATCH),
        gradient_accumulation_steps=training.accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type="constant_with_warmup" if training.schedule == "constant" else training.schedule,
        warmup_steps=training.warmup,
        max_grad_norm=training.clip,
        use_cpu=not torch.accelerator.is_available(),
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        seed=training.seed,
        train_sampling_strategy="group_by_length" if training.order == "length" else "random",
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,
        metric_for_best_model=None if training.evaluate_every == "never" else task.best_metric,
        greater_is_better=task.greater_is_better,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
        **options,
    )


def _interval(kind: str, every: str | int) -> dict[str, Any]:
    if isinstance(every, int):
        return {f"{kind}_strategy": "steps", f"{kind}_steps": every}
    return {f"{kind}_strategy": "no" if every == "never" else every}


def _checkpointing(on: bool) -> dict[str, Any]:
    known = TrainingArguments.__dataclass_fields__
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
    return {name: on, f"{name}_kwargs": {"use_reentrant": False} if on else None}


def _refuse_impossible(training: Training, processes: int) -> None:
    if training.batch_size % (processes * training.accumulation):
        raise BadRecipe(
            f"training.batch_size: {training.batch_size} samples do not divide by {processes} processes with "
            f"{training.accumulation} slices each: take a multiple of {processes * training.accumulation}"
        )
    if training.precision == "fp16" and not torch.cuda.is_available():
        raise BadRecipe("training.precision: fp16 needs an accelerator, and there is none; use bf16 or fp32")
    if training.sharding == "fsdp2" and processes == 1:
        raise BadRecipe(
            "training.sharding: fsdp2 needs several processes: "
            "`torchrun --standalone --nproc-per-node 2 -m graftwork tune ...`"
        )
