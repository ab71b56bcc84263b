"""What a recipe names, made: rows, task, base model, encoded examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graftwork.data.rows import Splits
from graftwork.data.splits import draw, read_splits
from graftwork.data.tables import Layout
from graftwork.errors import BadRecipe
from graftwork.models.base import load_base
from graftwork.models.pair import load_pair
from graftwork.reference.technique import Technique
from graftwork.tasks.base import Encoded, Task
from graftwork.tasks.registry import make_task
from graftwork.training.recipe import Data, Model, Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Materials:
    """Everything a run works on.

    Attributes:
        task: fitted to the training rows, so it knows its labels.
        model: the base, with the task's head.
        preprocessor: tokenizer or image processor.
        splits: name -> encoded examples: train, validation, and test where there is one.
    """

    task: Task
    model: nn.Module
    preprocessor: Any
    splits: dict[str, Encoded]

    def ids(self, text: str) -> list[int]:
        """The tokens of a text that a technique starts from."""
        if self.task.preprocessor != "text":
            raise BadRecipe(f"technique: {text!r} cannot be made into tokens, {self.task.name} reads no text")
        return list(self.preprocessor(text, add_special_tokens=False)["input_ids"])


def prepare(recipe: Recipe) -> Materials:
    """Read the data, load the base, encode."""
    rows = read(recipe.data, recipe.training.seed)
    task = make_task(recipe.task.name, recipe.task.options).fit(rows.train)
    model, preprocessor = base(recipe.model, task)
    splits = {
        name: task.encode(part, preprocessor, training=name == "train")
        for name, part in (("train", rows.train), ("validation", rows.validation), ("test", rows.test))
        if part is not None
    }
    return Materials(task, model, preprocessor, splits)


def read(data: Data, seed: int) -> Splits:
    """The rows of each part."""
    found = read_splits(
        data.train,
        validation=data.validation,
        test=data.test,
        hold_out=data.hold_out,
        seed=seed,
        columns=data.columns,
        layout=Layout(**data.layout.model_dump()),
    )
    few = data.evaluation_limit
    validation, test = (part and draw(part, few, seed) for part in (found.validation, found.test))
    return Splits(draw(found.train, data.limit, seed), validation, test)


def originals(model: Model, task: Task, techniques: Sequence[Technique]) -> nn.Module | None:
    """The base in full precision, where a technique starts from what its quantisation lost."""
    asking = [technique.name for technique in techniques if technique.needs_originals]
    if not asking:
        return None
    if model.quantised is None:
        raise BadRecipe(
            f"technique: {asking[0]} is to start from what quantisation lost, and the base is not quantised; set "
            "model.quantised, or take another init"
        )
    return base(model.model_copy(update={"quantised": None}), task)[0]


def base(model: Model, task: Task) -> tuple[nn.Module, Any]:
    """The host and its preprocessor."""
    if model.pair:
        return load_pair(*model.pair, dtype=DTYPES[model.dtype])
    return load_base(
        model.title,
        task=task.name,
        labels=task.labels or task.outputs,
        dtype=DTYPES[model.dtype],
        quantised=model.quantised,
    )
