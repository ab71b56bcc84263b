"""A recipe: everything that decides a run, as data. `Recipe.load(path, overrides)` reads and checks one.

    model: {name: minilm}
    technique: {name: lora, rank: 8}
    task: {name: text-classification}
    data: {train: docstrings:subjects}
    training: {epochs: 3, learning_rate: 1e-3}
    output: runs/subjects-lora

Paths are relative to the working directory. `model: minilm` or `technique: lora` stands for `{name: ...}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from graftwork.errors import BadOption, BadRecipe
from graftwork.objectives.base import Objective
from graftwork.objectives.registry import distinct, make_objective
from graftwork.reference.catalogue import make
from graftwork.reference.technique import Technique
from graftwork.tasks.registry import make_task, task_class
from graftwork.training import yaml
from graftwork.training.contexts import Contexts, check_techniques, techniques_of
from graftwork.training.optimizer import LowRank, make_optimizer
from graftwork.training.overrides import override
from graftwork.training.problems import describe
from graftwork.training.section import Named, Section, Techniques, checked, listed, named

NAME = "default"  # of the adapter of a recipe without contexts


def _interval(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value in ("epoch", "never") or (whole and value >= 1):
        return value
    raise ValueError(f"{value!r} is not an interval: write epoch, never, or a number of steps from 1")


Interval = Annotated[str | int, BeforeValidator(_interval)]
Share = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]


class Model(Section):
    """The host: one base by name, or a captioner out of two.

    Args:
        name: an embedded model, a folder or a hub name.
        vision, text: in place of a name, a vision transformer and a decoder; what joins them is trained.
        dtype: how its weights are stored.
        quantised: how its linear layers are, by bitsandbytes; `dtype` is then what they compute in.
    """

    name: Name | None = None
    vision: Name | None = None
    text: Name | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    quantised: Literal["nf4", "int8"] | None = None

    @property
    def pair(self) -> tuple[str, str] | None:
        """Vision and text, where it is made of two."""
        return (self.vision, self.text) if self.vision and self.text else None

    @property
    def title(self) -> str:
        """What a report calls it."""
        return self.name or " + ".join(self.pair or ())

    @model_validator(mode="after")
    def _one_or_two(self) -> Model:
        given = [part is not None for part in (self.name, self.vision, self.text)]
        if given not in ([True, False, False], [False, True, True]):
            raise ValueError("give a name, or vision and text for a captioner out of two")
        if self.pair and self.quantised:
            raise ValueError("quantised takes a model of one name: leave it out")
        return self


OneTask = Annotated[Named, BeforeValidator(named), checked(make_task)]
OneOptimizer = Annotated[Named, BeforeValidator(named), checked(make_optimizer)]
OneObjective = Annotated[Named, BeforeValidator(named), checked(make_objective)]


def _distinct(specs: list[Named]) -> list[Named]:
    try:
        distinct(spec.name for spec in specs)
    except BadOption as error:
        raise ValueError(str(error)) from None
    return specs


Terms = Annotated[list[OneObjective], BeforeValidator(listed), AfterValidator(_distinct)]


class FileLayout(Section):
    """How files are laid out, where their suffix does not say; as in `graftwork.data.tables.Layout`."""

    header: bool = True
    delimiter: str | None = None
    quoted: bool | None = None
    paragraphs: bool = False
    images: str | None = None


class Data(Section):
    """Paths, embedded names (`docstrings:subjects`) or hub names.

    Args:
        train, validation, test: a part not named comes from the source of `train` where that has parts.
        columns: role -> column of the source (or its number): `{text: sentence, label: 1}`.
        layout: of csv, tsv and text files.
        hold_out: share of the training rows kept aside where there are no validation rows.
        limit: at most so many training rows.
        evaluation_limit: at most so many rows of validation and of test.
    """

    train: str
    validation: str | None = None
    test: str | None = None
    columns: dict[str, str | int] | None = None
    layout: FileLayout = FileLayout()
    hold_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    limit: Annotated[int, Field(ge=1)] | None = None
    evaluation_limit: Annotated[int, Field(ge=1)] | None = None


class Training(Section):
    """How it is learnt.

    Args:
        epochs, steps: length of the run; `steps` wins when given.
        batch_size: samples per optimiser step, over all processes and accumulation slices.
        accumulation: slices that a process cuts its share of a batch into.
        checkpointing: recompute activations in the backward pass.
        lean: the frozen host keeps less for backward: gated feed-forwards, RMS norms, vocabulary loss.
        warmup: share of all steps in which the learning rate rises from zero.
        weight_decay: applies to matrices, never to vectors.
        optimizer: AdamW, or one of `graftwork.optimizers` with its options; rate and decay stay those above.
        clip: bound of the gradient's norm; 0 does not clip.
        precision: of the arithmetic (autocast); the weights' own is `model.dtype`.
        evaluate_every, save_every: "epoch", a number of steps, or "never".
        patience: evaluations without improvement after which the run stops.
        keep: which state becomes the adapter, that of the best evaluation or the last.
        order: of the samples, "random", or "length": random batches of like length, which pad less.
        context_dropout: share of the tokens whose context is off, drawn anew in each training forward.
        calibration_batches: how many batches of training samples a technique starts from that starts from data.
        sharding: "fsdp2" shards the model over the processes; "none" copies it to each (DDP).
    """

    epochs: Annotated[float, Field(gt=0)] = 3
    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 32
    accumulation: Annotated[int, Field(ge=1)] = 1
    checkpointing: bool = False
    lean: bool = False
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Share = 0.06
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    optimizer: OneOptimizer | None = None
    clip: Annotated[float, Field(ge=0)] = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    log_every: Annotated[int, Field(ge=1)] = 10
    evaluate_every: Interval = "epoch"
    save_every: Interval = "epoch"
    patience: Annotated[int, Field(ge=1)] | None = None
    keep: Literal["best", "last"] = "best"
    order: Literal["random", "length"] = "random"
    context_dropout: Share = 0.0
    calibration_batches: Annotated[int, Field(ge=1)] = 8
    sharding: Literal["none", "fsdp2"] = "none"

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} does not divide by accumulation={self.accumulation}"
            )
        if self.patience is not None and self.evaluate_every == "never":
            raise ValueError("patience needs evaluations: set evaluate_every")
        if self.sharding != "none" and self.optimizer is not None and self.optimizer.name != "adamw":
            raise ValueError(f"{self.optimizer.name} needs whole gradients: set sharding: none")
        return self

    def low_rank(self) -> LowRank | None:
        """The low-rank optimiser that is asked for; None is AdamW."""
        return None if self.optimizer is None else make_optimizer(self.optimizer.name, self.optimizer.options)


class Recipe(Section):
    """Everything that decides a run."""

    model: Annotated[Model, BeforeValidator(named)]
    technique: Techniques | None = None
    contexts: Contexts | None = None
    task: OneTask
    data: Data
    training: Training = Training()
    objectives: Terms = []
    output: str

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        if self.model.pair and self._reads != "image-text":
            raise ValueError(
                f"model: vision and text make a captioner, and {self.task.name} is no task for one: take captioning"
            )
        if self.contexts is not None:
            if self._reads == "image":
                raise ValueError(
                    f"contexts: they serve tokens, and {self.task.name} has none; leave them out"
                )
            check_techniques(self.contexts, self.technique)
        elif self.technique is None:
            raise ValueError("technique: missing")
        elif self.training.context_dropout:
            raise ValueError("training.context_dropout: there are no contexts to drop; leave it out")
        return self

    @property
    def _reads(self) -> str:
        return task_class(self.task.name).preprocessor

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file and apply `section.key=value` overrides; BadRecipe names the path at fault."""
        return cls.of(yaml.read(Path(path)), overrides, origin=str(path))

    @classmethod
    def of(cls, values: Mapping[str, Any], overrides: Sequence[str] = (), origin: str = "recipe") -> Recipe:
        """A recipe from plain values."""
        changed = override(values, overrides)
        try:
            return cls.model_validate(changed)
        except ValidationError as error:
            raise BadRecipe(describe(error, cls, changed, origin)) from None

    def adapters(self) -> dict[str, list[Technique]]:
        """Name -> what to attach, in order: one adapter, or one for each context."""
        if self.contexts is None:
            return {NAME: [make(spec.name, spec.options) for spec in self.technique or []]}
        return {name: techniques_of(context, self.technique) for name, context in self.contexts.items()}

    def techniques(self) -> list[Technique]:
        """The techniques of all adapters, in order."""
        return [technique for techniques in self.adapters().values() for technique in techniques]

    def terms(self) -> list[Objective]:
        """What to add to the loss."""
        return [make_objective(spec.name, spec.options) for spec in self.objectives]

    def resolved(self) -> dict[str, Any]:
        """Plain values, defaults filled in; `Recipe.of` of them is this recipe again."""
        values = self.model_dump(exclude_none=True)
        for holder in (values, *values.get("contexts", {}).values()):
            if len(holder.get("technique", ())) == 1:
                holder["technique"] = holder["technique"][0]
        return values

    def text(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.dump(self.resolved())
