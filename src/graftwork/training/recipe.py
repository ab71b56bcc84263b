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

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from graftwork.errors import BadOption, BadRecipe, GraftworkError
from graftwork.objectives.base import Objective
from graftwork.objectives.registry import distinct, make_objective
from graftwork.reference.catalogue import make
from graftwork.reference.technique import Technique
from graftwork.tasks.registry import make_task
from graftwork.training import yaml
from graftwork.training.optimizer import LowRank, make_optimizer
from graftwork.training.overrides import override
from graftwork.training.problems import describe


def _interval(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value in ("epoch", "never") or (whole and value >= 1):
        return value
    raise ValueError(f"{value!r} is not an interval: write epoch, never, or a number of steps from 1")


Interval = Annotated[str | int, BeforeValidator(_interval)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of a recipe: strict types, no unknown keys, no change after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Model(Section):
    """The host.

    Args:
        name: an embedded model, a folder or a hub name.
        dtype: how its weights are stored.
        quantised: how its linear layers are, by bitsandbytes; `dtype` is then what they compute in.
    """

    name: str = Field(min_length=1)
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    quantised: Literal["nf4", "int8"] | None = None


class Named(BaseModel):
    """Something by name, with its options beside the name; what it names checks each of them."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        return self.model_extra or {}


def _checked(check: Callable[[str, Mapping[str, Any]], object]) -> AfterValidator:
    """Let `check` look at name and options; what it raises becomes a finding of pydantic's."""

    def look(spec: Named) -> Named:
        try:
            check(spec.name, spec.options)
        except GraftworkError as error:
            raise ValueError(str(error)) from None
        return spec

    return AfterValidator(look)


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


OneTechnique = Annotated[Named, BeforeValidator(_named), _checked(make)]
OneTask = Annotated[Named, BeforeValidator(_named), _checked(make_task)]
OneOptimizer = Annotated[Named, BeforeValidator(_named), _checked(make_optimizer)]
OneObjective = Annotated[Named, BeforeValidator(_named), _checked(make_objective)]


def _distinct(specs: list[Named]) -> list[Named]:
    try:
        distinct(spec.name for spec in specs)
    except BadOption as error:
        raise ValueError(str(error)) from None
    return specs


Terms = Annotated[list[OneObjective], BeforeValidator(_listed), AfterValidator(_distinct)]


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

    model: Annotated[Model, BeforeValidator(_named)]
    technique: Annotated[list[OneTechnique], BeforeValidator(_listed), Field(min_length=1)]
    task: OneTask
    data: Data
    training: Training = Training()
    objectives: Terms = []
    output: str

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

    def techniques(self) -> list[Technique]:
        """What to attach, in order."""
        return [make(spec.name, spec.options) for spec in self.technique]

    def terms(self) -> list[Objective]:
        """What to add to the loss."""
        return [make_objective(spec.name, spec.options) for spec in self.objectives]

    def resolved(self) -> dict[str, Any]:
        """Plain values, defaults filled in; `Recipe.of` of them is this recipe again."""
        values = self.model_dump(exclude_none=True)
        if len(self.technique) == 1:
            values["technique"] = values["technique"][0]
        return values

    def text(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.dump(self.resolved())
