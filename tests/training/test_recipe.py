"""Recipes: what is refused and in which words, overrides, and reading back what was written."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwork.errors import BadRecipe
from graftwork.training import yaml
from graftwork.training.recipe import Recipe, Training

BASE = {
    "model": "minilm",
    "technique": {"name": "lora", "rank": 4},
    "task": "text-classification",
    "data": {"train": "docstrings:subjects"},
    "output": "runs/x",
}


def refusal(*overrides: str, **values: object) -> str:
    with pytest.raises(BadRecipe) as caught:
        Recipe.of({**BASE, **values}, overrides, origin="my.yaml")
    return str(caught.value)


def test_short_forms_and_defaults() -> None:
    recipe = Recipe.of(BASE)
    assert recipe.model.name == "minilm"
    assert recipe.task.name == "text-classification"
    assert [t.name for t in recipe.techniques()] == ["lora"]
    assert recipe.techniques()[0].rank == 4
    assert recipe.training == Training()


@pytest.mark.parametrize(
    ("override", "path", "nearest"),
    [
        ("training.epoch=3", "training.epoch:", "training.epochs"),
        ("epochs=3", "epochs:", "training.epochs"),
        ("trainin={}", "trainin:", "training"),
        ("data.trian=x", "data.trian:", "data.train"),
        ("model.dtyp=bf16", "model.dtyp:", "model.dtype"),
        ("data.layout.heder=false", "data.layout.heder:", "data.layout.header"),
        ("technique.rnk=3", "technique:", "rank"),
        ("technique=lorra", "technique:", "lora"),
        ("task=text-clasification", "task:", "text-classification"),
        ("task.max_lenth=3", "task:", "max_length"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(override: str, path: str, nearest: str) -> None:
    text = refusal(override)
    assert text.startswith("my.yaml")
    assert path in text
    assert nearest in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epochs=three", "training.epochs: input should be a valid number, not 'three'"),
        ("training.steps=1.5", "training.steps"),
        ("training.seed=-1", "training.seed"),
        ("training.checkpointing=yes", "training.checkpointing"),
        ("training.evaluate_every=epocs", "training.evaluate_every: 'epocs' is not an interval"),
        ("training.save_every=0", "training.save_every: 0 is not an interval"),
        ("training.precision=int8", "training.precision"),
        ("technique.rank=0", "technique: lora: rank=0 must be at least 1"),
        ("technique=[]", "technique"),
        ("output=null", "output"),
        ("training.accumulation=3", "batch_size=32 does not divide by accumulation=3"),
        ("data.train.x=3", "nothing below it"),
        ("technique.rank", "section.key=value"),
        ("training={a: 1", "not valid YAML"),
    ],
)
def test_impossible_values_are_refused_by_path(override: str, words: str) -> None:
    assert words in refusal(override)


def test_a_missing_section_is_named() -> None:
    values = {key: value for key, value in BASE.items() if key != "data"}
    with pytest.raises(BadRecipe, match="data: missing"):
        Recipe.of(values)


def test_patience_needs_evaluations() -> None:
    assert "evaluate_every" in refusal("training.patience=2", "training.evaluate_every=never")


def test_all_findings_are_told_at_once() -> None:
    text = refusal("training.epoch=3", "data.trian=x", "model.dtype=fp64")
    assert len(text.splitlines()) == 4


def test_overrides_are_typed_and_open_short_forms() -> None:
    recipe = Recipe.of(
        BASE,
        [
            "training.learning_rate=1e-3",
            "training.steps=5",
            "training.patience=null",
            "model.dtype=bf16",
            "task.max_length=64",
            "technique.layers=last 2",
            "technique.workspaces=[attention.query]",
        ],
    )
    assert recipe.training.learning_rate == 1e-3
    assert recipe.training.steps == 5
    assert recipe.model.name == "minilm"
    assert recipe.model.dtype == "bf16"
    assert recipe.task.options == {"max_length": 64}
    assert recipe.techniques()[0].workspaces == ("attention.query",)


def test_several_techniques_are_addressed_by_number() -> None:
    recipe = Recipe.of({**BASE, "technique": ["lora", {"name": "ia3"}]}, ["technique.0.rank=2"])
    assert [t.name for t in recipe.techniques()] == ["lora", "ia3"]
    assert recipe.techniques()[0].rank == 2
    assert "no position in the list" in refusal("technique.2.rank=2", technique=["lora", "ia3"])
    assert "technique.1" in refusal("technique.1.rank=2", technique=["lora", "ia3"])


@given(
    rate=st.floats(1e-9, 1.0),
    epochs=st.one_of(st.integers(1, 99), st.floats(0.01, 99)),
    seed=st.integers(0, 2**32 - 1),
    every=st.one_of(st.just("epoch"), st.integers(1, 1000)),
    rank=st.integers(1, 64),
)
def test_what_is_written_reads_back_as_the_same_recipe(rate, epochs, seed, every, rank) -> None:
    training = {"learning_rate": rate, "epochs": epochs, "seed": seed, "evaluate_every": every}
    recipe = Recipe.of({**BASE, "training": training, "technique": {"name": "lora", "rank": rank}})
    again = Recipe.of(yaml.parse(recipe.text(), "text"))
    assert again == recipe
    assert again.text() == recipe.text()


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(Recipe.of(BASE).text())
    assert Recipe.load(file, ["training.seed=7"]).training.seed == 7
    file.write_text("model: minilm\nmodel: other\n")
    with pytest.raises(BadRecipe, match="model is given twice"):
        Recipe.load(file)
    file.write_text("a: [1\nb: 2\n")
    with pytest.raises(BadRecipe, match=r"r\.yaml, line 2"):
        Recipe.load(file)
    file.write_text("just text")
    with pytest.raises(BadRecipe, match="a mapping"):
        Recipe.load(file)
    with pytest.raises(BadRecipe, match="cannot read"):
        Recipe.load(tmp_path / "absent.yaml")


def test_yaml_numbers_and_booleans() -> None:
    parsed = yaml.parse("{a: 1e-3, b: 1e3, c: 2024-01-01, d: no, e: true, f: .5, g: 1, h: '1', i: 1_0}", "t")
    assert parsed == {
        "a": 1e-3,
        "b": 1e3,
        "c": "2024-01-01",
        "d": "no",
        "e": True,
        "f": 0.5,
        "g": 1,
        "h": "1",
        "i": 10,
    }


def test_yaml_runs_nothing() -> None:
    with pytest.raises(BadRecipe, match="not valid YAML"):
        yaml.parse("!!python/object/apply:os.system ['true']", "t")
