"""The recipes in examples/ are valid, cover every task, and name data with the columns their tasks need."""

from pathlib import Path

import pytest

from graftwork.data.embedded import SETS
from graftwork.data.readers import read_rows
from graftwork.models.base import MINILM
from graftwork.models.hosts import HOSTS
from graftwork.tasks.registry import make_task, tasks
from graftwork.training.recipe import Recipe

pytestmark = pytest.mark.slow

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def test_every_task_has_an_example() -> None:
    assert {Recipe.load(file).task.name for file in EXAMPLES} == set(tasks())


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_a_valid_recipe(file: Path) -> None:
    recipe = Recipe.load(file)
    assert set(recipe.model.pair or [recipe.model.title]) <= {MINILM, *HOSTS}
    assert recipe.output.startswith("runs/")
    task = make_task(recipe.task.name, recipe.task.options)
    if recipe.data.train in SETS:
        task.require(read_rows(recipe.data.train, split="validation", columns=recipe.data.columns))
    else:
        assert set(task.columns) <= set(recipe.data.columns or task.columns)
