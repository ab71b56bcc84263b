"""transformers' Trainer with our checkpoints, exact loss weighting, and evaluation by generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.distributed import all_gather_object, barrier
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput

from graftwork.objectives.rows import shifts_labels
from graftwork.objectives.total import Objectives
from graftwork.tasks.base import IGNORED, Encoded, Task
from graftwork.training import checkpoints, states
from graftwork.training.groups import Group
from graftwork.training.loss_parts import EvaluationLoss, LossParts
from graftwork.training.optimizer import LowRank
from graftwork.training.order import ByLength, lengths

Batch = dict[str, Any]


class Trainer(transformers.Trainer):
    """Differences from transformers' own:

    - A checkpoint holds trained tensors, optimiser, scheduler and random states, nothing of the base; it is
      whole or absent (`checkpoints.py`).
    - The loss of a slice of a batch counts by its share of the counted labels, over accumulation slices and
      processes alike, so that neither changes the gradient.
    - The loss of an evaluation is the mean over its counted labels, whatever the batches and processes.
    - Objectives add to the training loss, and each part of it is logged; evaluation shows the task's loss.
    - The state of the best evaluation is always checkpointed; training stops after `patience` evaluations
      without a better one.
    - Batches of like length come in an order that an interrupted run goes on in.
    - Running statistics of the frozen base (batch norm) stay as they are.
    """

    def __init__(
        self,
        *,
        task: Task,
        groups: Callable[[nn.Module], Sequence[Group]],
        patience: int | None,
        low_rank: LowRank | None = None,
        objectives: Objectives | None = None,
        **options: Any,
    ) -> None:
        with _trains_quantised(options["model"]):
            super().__init__(**options)
        self.model: Any
        self.lr_scheduler: Any
        self._task, self._groups, self._patience = task, groups, patience
        self._low_rank = low_rank
        self._loss_shifts_labels = shifts_labels(self.model)  # transformers' own misses GPT-2
        self._objectives = objectives
        self._parts = LossParts(objectives.names if objectives else ())
        self._evaluated = EvaluationLoss()
        self._frozen_statistics = [
            m for m in self.model.modules() if getattr(m, "track_running_stats", False)
        ]
        self._resumed: checkpoints.Contents | None = None
        self.remove_callback(PrinterCallback)

    # The loss

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        for module in self._frozen_statistics:
            module.eval()
        outputs = model(**inputs)
        loss = outputs["loss"]
        if model.training:
            loss = self._weighted(loss, outputs, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _weighted(self, loss: Tensor, outputs: Mapping[str, Any], inputs: Batch, total: Tensor) -> Tensor:
        """A mean over this slice's counted labels, as its part of the mean over the whole batch's."""
        counted = self._counted(inputs["labels"])
        if counted == 0:
            trained = (p.sum() for p in self.model.parameters() if p.requires_grad)
            return torch.stack(list(trained)).sum() * 0.0  # the mean of nothing is not a number
        share = counted / total
        if self._objectives is not None:
            progress = self.state.global_step / self.state.max_steps
            loss, parts = self._objectives(outputs, inputs, progress=progress)
            self._parts.add(parts, share)
        return loss * share * self.accelerator.num_processes

    def _counted(self, labels: Tensor) -> int:
        if labels.is_floating_point():
            return labels.numel()
        return int((labels[..., 1:] if self._loss_shifts_labels else labels).ne(IGNORED).sum())

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        total = torch.tensor(sum(self._counted(batch["labels"]) for batch in batch_samples), device=device)
        return self.accelerator.gather(total).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._objectives is not None:
            logs = {**logs, **self._parts.take(self.accelerator)}
        super().log(logs, start_time)

    # Optimiser

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            rate = self.args.learning_rate
            groups = [
                {"params": g.parameters, "lr": rate * g.factor, "weight_decay": g.weight_decay}
                for g in self._groups(self.model)
            ]
            if self._low_rank is not None:
                self.optimizer = self._low_rank.build(self.model, groups)
            else:
                kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer = kind(groups, **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        slices = self.args.gradient_accumulation_steps * self.args.world_size
        return ByLength(
            lengths(cast(Encoded, self.train_dataset)), self.args.train_batch_size * slices, self.args.seed
        )

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._evaluated = EvaluationLoss()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if (loss := self._evaluated.mean(self.accelerator)) is not None:
            assert output.metrics is not None
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        loss, logits, labels = super().prediction_step(
            model, inputs, prediction_loss_only or self._task.generates, ignore_keys
        )
        self._note_loss(model, inputs, loss)
        if not self._task.generates or prediction_loss_only:
            return loss, logits, labels
        inputs = self._prepare_inputs(inputs)
        given = {key: value for key, value in inputs.items() if key not in ("labels", "decoder_input_ids")}
        with torch.no_grad(), self.compute_loss_context_manager():
            ids = self.accelerator.unwrap_model(model).generate(**given, **self._task.generation())
        return loss, ids, inputs["labels"]

    def _note_loss(self, model: nn.Module, inputs: Batch, loss: Tensor | None) -> None:
        """Count a batch's loss, but not the rows that only make the last batches of all processes alike."""
        labels, dealt = inputs["labels"], self.accelerator.gradient_state
        if self.args.world_size > 1 and dealt.end_of_dataloader and dealt.remainder > 0:
            own = min(max(dealt.remainder - self.args.process_index * len(labels), 0), len(labels))
            # A process without a row of its own runs one too: a sharded model is gathered by all together.
            kept = {key: value[: max(own, 1)] for key, value in inputs.items()}
            loss, _, _ = super().prediction_step(model, kept, True)
            labels = labels[:own]
        if loss is not None:
            self._evaluated.add(loss, self._counted(labels))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        better = super()._determine_best_metric(metrics, trial)
        if better:
            self.state.best_global_step = self.state.global_step
            self.control.should_save = True
        self.control.should_training_stop = self.control.should_training_stop or self.out_of_patience()
        return better

    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations brought nothing better, by the history in the state."""
        key = f"eval_{self._task.best_metric}"
        steps = {entry["step"] for entry in self.state.log_history if key in entry}
        stale = sum(step > (self.state.best_global_step or 0) for step in steps)
        return self._patience is not None and stale >= self._patience

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        contents = self._contents()
        run, step = Path(str(self.args.output_dir)), self.state.global_step
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(run / f"checkpoint-{self.state.best_global_step}")
        if self.args.should_save:
            newest = checkpoints.write(run, step, contents, lambda file: self.state.save_to_json(str(file)))
            keep = {newest, Path(self.state.best_model_checkpoint or newest)}
            checkpoints.remove(folder for folder in checkpoints.whole(run) if folder not in keep)
        if self.args.world_size > 1:
            barrier()

    def _contents(self) -> checkpoints.Contents:
        model = self.accelerator.unwrap_model(self.model)
        trained = states.trained(model)
        names = {id(tensor): name for name, tensor in trained.items()}
        moments, numbers = states.optimizer_state(self.optimizer, names)
        tensors = {f"trained/{name}": states.whole(tensor) for name, tensor in trained.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in moments.items()}
        randoms = []
        for rank, state in enumerate(self._of_all(states.random_state())):
            tensors |= {f"random/{rank}/{k}": v for k, v in state.items() if isinstance(v, Tensor)}
            randoms.append({k: v for k, v in state.items() if not isinstance(v, Tensor)})
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        values = {"optimizer": numbers, "random": randoms, "scaler": scaler, "scheduler": self._schedule()}
        return checkpoints.Contents(tensors, values)

    def _schedule(self) -> dict[str, Any]:
        state = self.lr_scheduler.state_dict()
        return {**state, "lr_lambdas": [None for _ in state["lr_lambdas"]]}

    def _of_all(self, value: Any) -> list[Any]:
        if self.args.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.args.world_size
        all_gather_object(gathered, value)
        return gathered

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._resumed = checkpoints.read(Path(resume_from_checkpoint))
        values = _below(self._resumed.tensors, "trained/")
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        states.restore_trained(target, values, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._resumed is None:
            return
        names = {id(t): n for n, t in states.trained(self.accelerator.unwrap_model(self.model)).items()}
        tensors, values = _below(self._resumed.tensors, "optimizer/"), self._resumed.values
        states.restore_optimizer(self.optimizer, names, tensors, values["optimizer"])
        self.lr_scheduler.load_state_dict(dict(values["scheduler"]))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if (
            self._resumed is not None
            and self._resumed.values["scaler"]
            and self.accelerator.scaler is not None
        ):
            self.accelerator.scaler.load_state_dict(self._resumed.values["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._resumed is None:
            return
        rank, values = self.args.process_index, self._resumed.values["random"]
        if rank < len(values):  # on more processes than before the newcomers start from the seed
            states.restore_random({**values[rank], **_below(self._resumed.tensors, f"random/{rank}/")})

    def restore(self, folder: Path) -> None:
        """Give the model the trained tensors of a checkpoint."""
        self._load_from_checkpoint(str(folder), self.model)


@contextmanager
def _trains_quantised(model: nn.Module) -> Iterator[None]:
    """transformers refuses to train a quantised model without an adapter, and knows those of HF PEFT only."""
    model.__dict__["_hf_peft_config_loaded"] = True
    try:
        yield
    finally:
        del model.__dict__["_hf_peft_config_loaded"]


def _below(tensors: Any, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
