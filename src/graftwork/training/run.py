"""`tune(recipe)`: from a recipe to a run folder."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed
from transformers.trainer_callback import TrainerState

from graftwork.adapters.store import save
from graftwork.analysis.cost import cost
from graftwork.engine.lean_host import lean
from graftwork.errors import PortUnavailable
from graftwork.objectives.total import Objectives
from graftwork.reference.technique import Technique
from graftwork.training import checkpoints
from graftwork.training.arguments import training_arguments
from graftwork.training.curves import draw
from graftwork.training.folder import RunFolder, open_run
from graftwork.training.grafting import Grafted, graft, planned
from graftwork.training.groups import grouped
from graftwork.training.joined import save_connector
from graftwork.training.journal import Journal, Recorder, Watch, is_overhead
from graftwork.training.materials import Materials, prepare
from graftwork.training.memory import peak_bytes, reset_peak
from graftwork.training.processes import by_first, processes
from graftwork.training.recipe import Recipe, Training
from graftwork.training.result import RunResult, card, versions
from graftwork.training.trainer import Trainer


def tune(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, watch: Watch | None = None
) -> RunResult:
    """Train the adapter that a recipe describes.

    An interrupted run of the same recipe in the same folder goes on where it was.

    Args:
        recipe: what to do.
        resume: give back the result of a finished run instead of refusing to overwrite it.
        overwrite: delete what an earlier run left in the output folder.
        watch: called with each metrics record and the total number of steps.
    """
    folder = RunFolder(Path(recipe.output))
    if resume and folder.finished:
        return RunResult.of(folder.facts(), str(folder.result))
    checkpoint = by_first(lambda: open_run(recipe, overwrite=overwrite))
    set_seed(recipe.training.seed)
    materials = prepare(recipe)
    plan = planned(recipe, materials)
    flops = step_flops(materials, [t for techniques in plan.values() for t in techniques], recipe.training)
    grafted = graft(recipe, materials, plan)
    if recipe.training.lean:
        make_lean(materials.model, loss=not any(term.reads_logits for term in recipe.terms()))
    return _Run(recipe, folder, materials, grafted, flops, watch).go(checkpoint)


@dataclass
class _Run:
    recipe: Recipe
    folder: RunFolder
    materials: Materials
    grafted: Grafted
    flops: int
    watch: Watch | None

    def go(self, checkpoint: Path | None) -> RunResult:
        journal = Journal(self.folder.metrics, writes=processes().is_main_process)
        before = journal.cut(checkpoints.step_of(checkpoint) if checkpoint else 0)
        recorder = Recorder(journal, before, self.watch)
        facts = self._facts()
        trainer = self._trainer(recorder)
        reset_peak()
        self._train(trainer, checkpoint)
        measured = {
            "peak_bytes": peak_bytes(),
            "seconds_per_step": recorder.seconds_per_step,
            "seconds": recorder.seconds,
        }
        trainer.remove_callback(recorder)
        kept = self._keep(trainer)
        scores = self._scores(trainer)
        file_bytes = self._save(trainer)
        outcome = {
            "scores": scores,
            "file_bytes": file_bytes,
            "kept_step": kept,
            "steps": trainer.state.global_step,
            "stopped_early": trainer.state.global_step < trainer.state.max_steps,
        }
        result = RunResult.of({**facts, **measured, **outcome}, self.recipe.output)
        by_first(lambda: self._write(result, journal))
        return result

    def _trainer(self, recorder: Recorder) -> Trainer:
        materials, training = self.materials, self.recipe.training
        arguments = training_arguments(training, materials.task, self.folder.path, processes().num_processes)
        return make_trainer(
            materials,
            args=arguments,
            patience=training.patience,
            objectives=Objectives(materials.model, terms) if (terms := self.recipe.terms()) else None,
            groups=lambda model: grouped(model, self.grafted.rates(model), training.weight_decay),
            low_rank=training.low_rank(),
            callbacks=[recorder],
        )

    def _train(self, trainer: Trainer, checkpoint: Path | None) -> None:
        if checkpoint is None:
            trainer.train()
            return
        state = TrainerState.load_from_json(str(checkpoint / checkpoints.TRAINER))
        trainer.state = state
        if state.global_step >= state.max_steps or trainer.out_of_patience():
            trainer.restore(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint))

    def _keep(self, trainer: Trainer) -> int:
        """Go back to the best state if that is what the recipe keeps; returns the step of what is kept."""
        best = trainer.state.best_global_step
        if self.recipe.training.keep == "last" or not best:
            return trainer.state.global_step
        if best != trainer.state.global_step:
            trainer.restore(self.folder.path / f"checkpoint-{best}")
        return best

    def _scores(self, trainer: Trainer) -> dict[str, dict[str, float]]:
        splits = {name: part for name, part in self.materials.splits.items() if name != "train"}
        return {name: scores_on(trainer, part) for name, part in splits.items()}

    def _save(self, trainer: Trainer) -> int:
        """Write the adapter files; a sharded model is gathered by all processes together."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.is_fsdp_enabled:  # by the recipe, or by `accelerate launch`
            self._write_files(model)
        else:
            by_first(lambda: self._write_files(model))
        processes().wait_for_everyone()
        files = [*self.folder.adapter.iterdir(), *([self.folder.connector] if self.grafted.connector else [])]
        return sum(file.stat().st_size for file in files)

    def _write_files(self, model: nn.Module) -> None:
        for name in self.grafted.adapters:
            save(model, self.folder.adapter, name=name)
        if self.grafted.connector is not None:
            save_connector(model, self.folder.connector)

    def _facts(self) -> dict[str, Any]:
        recipe, materials = self.recipe, self.materials
        own = {id(parameter) for parameter in self.grafted.parameters()}
        return {
            "output": recipe.output,
            "model": recipe.model.title,
            "task": recipe.task.name,
            "techniques": self.grafted.spelled(),
            "labels": materials.task.labels,
            "examples": {name: len(part) for name, part in materials.splits.items()},
            "best_metric": materials.task.best_metric,
            "trainable": self.grafted.count(),
            "parameters": sum(p.numel() for p in materials.model.parameters() if id(p) not in own),
            "flops_per_step": self.flops,
            "peak_of": "accelerator" if torch.cuda.is_available() else "process",
            "processes": processes().num_processes,
            "seed": recipe.training.seed,
            "command": shlex.join(["graftwork", *sys.argv[1:]]),
            "versions": versions(),
        }

    def _write(self, result: RunResult, journal: Journal) -> None:
        draw(journal.records(), result.best_metric, result.kept_step, self.folder.curves)
        self.folder.write(self.folder.card, card(result))
        self.folder.write(self.folder.result, result.text())
        checkpoints.remove(checkpoints.whole(self.folder.path))


def make_lean(model: nn.Module, *, loss: bool = True) -> None:
    """Let the host keep less; raises PortUnavailable where it has nothing to leave out.

    Args:
        loss: the vocabulary's loss too, which leaves the outputs without logits.
    """
    report = lean(model, loss=loss)
    if not any(report.taken.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(report.left.items())[:3])
        raise PortUnavailable(
            f"training.lean: {type(model).__name__} has no gated feed-forward, RMS norm or vocabulary loss "
            f"that could keep less{f' ({reasons})' if reasons else ''}; leave it out"
        )


def step_flops(materials: Materials, techniques: Sequence[Technique], training: Training) -> int:
    """Operations of one optimiser step on the first batch's shapes, over all processes."""
    rows = materials.splits["train"]
    batch = [rows[number] for number in range(min(training.batch_size, len(rows)))]
    inputs = materials.task.collator(materials.preprocessor)(batch)
    return cost(_unquantised(materials.model), techniques, inputs=inputs).step_flops


def _unquantised(model: nn.Module) -> Any:
    """The model, or the shapes of the one it was quantised from: as many operations, and those can be counted."""
    if not getattr(model, "is_quantized", False):
        return model
    with torch.device("meta"):
        return type(model)(model.config)


def make_trainer(materials: Materials, **options: Any) -> Trainer:
    """A trainer that scores by the task's own metrics."""
    task, preprocessor = materials.task, materials.preprocessor
    return Trainer(
        task=task,
        model=materials.model,
        data_collator=task.collator(preprocessor),
        train_dataset=materials.splits.get("train"),
        eval_dataset=materials.splits.get("validation"),
        compute_metrics=lambda found: task.metrics(found.predictions, found.label_ids, preprocessor),
        preprocess_logits_for_metrics=None if task.generates else task.preprocess_logits,
        **options,
    )


def scores_on(trainer: Trainer, examples: Any) -> dict[str, float]:
    """Loss and the task's metrics on encoded examples."""
    found = trainer.evaluate(examples, metric_key_prefix="final")
    scores = {key.removeprefix("final_"): value for key, value in found.items() if key.startswith("final_")}
    return {key: value for key, value in scores.items() if not is_overhead(key)}
