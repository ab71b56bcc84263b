"""The documentation is true: links resolve, examples run, every verb, name, key and error is there."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pydantic
import pytest
import torch
import typer
import yaml

import graftwork as gw
from graftwork import errors
from graftwork.cli.docs import own, page
from graftwork.cli.main import app
from graftwork.data import embedded
from graftwork.models.hosts import HOSTS
from graftwork.reference import catalogue
from graftwork.tasks.registry import tasks
from graftwork.training.contexts import Context
from graftwork.training.optimizer import KINDS
from graftwork.training.recipe import Data, FileLayout, Model, Recipe, Training
from graftwork.training.yaml import parse
from pages import FRONT, PAGES, ROOT, anchors, blocks, links, rows, run, title

DOCS = ROOT / "docs"
TRAINING = DOCS / "training.md"
OPTIMIZERS = DOCS / "optimizers.md"
CAPTIONING = DOCS / "captioning.md"
SECTIONS: dict[str, type[pydantic.BaseModel]] = {
    "": Recipe,
    "model.": Model,
    "contexts.NAME.": Context,
    "data.": Data,
    "data.layout.": FileLayout,
    "training.": Training,
}
RUNNABLE = [p for p in PAGES if p.parent.name != "techniques" and p != FRONT[0] and blocks(p, "python")]


@pytest.mark.parametrize("place", PAGES, ids=title)
def test_links_lead_somewhere(place: Path) -> None:
    for target in links(place):
        path, _, anchor = target.partition("#")
        there = (place.parent / path).resolve() if path else place
        assert there.exists(), f"{title(place)}: {target}"
        assert not anchor or anchor in anchors(there), f"{title(place)}: {target}"


@pytest.mark.parametrize("place", RUNNABLE, ids=title)
def test_examples_run(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    catalogue.techniques()  # all are imported before examples may add their own
    monkeypatch.setattr(catalogue, "_registered", dict(catalogue._registered))
    torch.manual_seed(0)
    run(place)


def test_every_page_is_on_the_map() -> None:
    linked = {(DOCS / target.partition("#")[0]).resolve() for target in links(DOCS / "index.md")}
    folders = {place for place in linked if place.is_dir()} | {DOCS / "techniques"}
    missing = {p for p in DOCS.rglob("*.md") if p not in linked and p.parent not in folders}
    assert {title(p) for p in missing} == {"docs/index.md"}, "link the others in docs/index.md"


def test_every_public_name_is_explained() -> None:
    text = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("library.md", "routing.md"))
    missing = [
        name for name in dir(gw) if not re.search(rf"\bgw\.{name}\b", text) and f"`{name}`" not in text
    ]
    assert not missing


def test_every_verb_is_in_the_readme() -> None:
    verbs = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named = {m[1] for row in rows(FRONT[0]) if (m := re.match(r"`graftwork ([\w-]+)", row[0]))}
    assert named == set(verbs)


def test_every_error_is_listed() -> None:
    known = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    listed = {m[1] for row in rows(DOCS / "library.md") if (m := re.fullmatch(r"`([A-Z]\w+)`", row[0]))}
    assert listed == known - {"GraftworkError"}


def keys() -> Iterator[tuple[str, str]]:
    """(dotted key, default as YAML) of every key that holds a value."""
    for prefix, section in SECTIONS.items():
        for name, field in section.model_fields.items():
            if f"{prefix}{name}." not in SECTIONS:
                default = "required" if field.is_required() else f"`{plain(field.default)}`"
                yield f"{prefix}{name}", default


def plain(value: object) -> str:
    return yaml.safe_dump(value).splitlines()[0]


def test_every_recipe_key_is_listed_with_its_default() -> None:
    keyed = [(re.fullmatch(r"`((?:\w+\.)*\w+)`", row[0]), row[1]) for row in rows(TRAINING) if len(row) == 3]
    listed = {match[1]: default for match, default in keyed if match}
    expected = dict(keys())
    assert {key: listed.get(key) for key in expected} == expected
    assert not {key for key in listed if key.partition(".")[0] in Recipe.model_fields} - set(expected)


def test_every_task_is_listed_with_its_options() -> None:
    table = {row[0].strip("`"): row for row in rows(TRAINING) if len(row) == 4}
    for name, kind in tasks().items():
        options = {f.name for f in dataclasses.fields(kind)} - {"labels"}
        assert set(re.findall(r"`(\w+)`", table[name][3])) == options, name
        assert set(kind.columns) | set(kind.optional_columns) == set(
            re.findall(r"`(\w+)`", table[name][1])
        ), name
        assert table[name][2] == kind.best_metric


def test_every_data_set_and_host_is_listed() -> None:
    first = {row[0].strip("`") for row in rows(TRAINING)}
    assert set(embedded.SETS) <= first
    assert all(f"`{name}`" in TRAINING.read_text(encoding="utf-8") for name in HOSTS)


def test_every_example_is_listed_and_reads() -> None:
    text = TRAINING.read_text(encoding="utf-8")
    for recipe in sorted((ROOT / "examples").glob("*.yaml")):
        assert f"(../examples/{recipe.name})" in text
        Recipe.load(recipe)


def test_every_option_of_the_optimizers_is_listed_with_its_default() -> None:
    table = {row[0].strip("`"): row[1].strip("`") for row in rows(OPTIMIZERS)}
    for kind in KINDS.values():
        for key, option in inspect.signature(kind).parameters.items():
            if key not in ("params", "svd"):
                assert ast.literal_eval(table[key]) == option.default, key
        assert table["svd"] == inspect.signature(kind).parameters["svd"].default


@pytest.mark.parametrize(
    "block", [block for page in (TRAINING, OPTIMIZERS, CAPTIONING) for block in blocks(page, "yaml")]
)
def test_recipes_on_the_page_are_valid(block: str) -> None:
    Recipe.of(parse(block, "the page"))


def test_technique_pages_are_current() -> None:
    for name, kind in own().items():
        assert (DOCS / "techniques" / f"{name}.md").read_text(encoding="utf-8") == page(kind), (
            "run `make docs`"
        )


def test_tests_that_pages_name_exist() -> None:
    for place in PAGES:
        for path in re.findall(r"`((?:tests|src)/[a-z0-9_/]+(?:\.py|/))`", place.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{title(place)}: {path}"


def test_the_import_order_on_the_page_is_the_tested_one() -> None:
    from test_structure import ORDER

    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    chain = re.search(r"`(errors < .*?)`", text, flags=re.DOTALL)
    assert chain is not None
    assert re.findall(r"\w+", chain[1]) == list(ORDER)
    folders = {row[0].strip("`/") for row in rows(DOCS / "architecture.md")}
    assert set(ORDER) - {"errors"} <= folders
