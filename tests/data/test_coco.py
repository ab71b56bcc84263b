"""COCO captions: rows, where images are looked for, and errors that say what is wrong."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from graftwork.data.readers import read_rows
from graftwork.data.tables import Layout
from graftwork.errors import BadData

IMAGES = [{"id": 7, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}]
CAPTIONS = [
    {"image_id": 7, "caption": " One. "},
    {"image_id": 9, "caption": "Two."},
    {"image_id": 7, "caption": "Three."},
]


def written(folder: Path, content: Any, images: str) -> Path:
    (folder / images).mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png"):
        (folder / images / name).touch()
    path = folder / "annotations" / "captions_train2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("images", "layout"),
    [("annotations", None), ("train2017", None), ("elsewhere", Layout(images="../elsewhere"))],
)
def test_a_row_for_each_annotation(tmp_path: Path, images: str, layout: Layout | None) -> None:
    rows = read_rows(written(tmp_path, {"images": IMAGES, "annotations": CAPTIONS}, images), layout=layout)
    assert rows["caption"] == ["One.", "Two.", "Three."]
    assert [Path(file).name for file in rows["image"]] == ["a.png", "b.png", "a.png"]
    assert all(Path(file).is_file() for file in rows["image"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"images": IMAGES, "annotations": [{"image_id": 8, "caption": "x"}]}, "does not list, 8"),
        ({"images": IMAGES, "annotations": [{"image_id": 7}]}, "without 'caption'"),
        ({"images": [{"id": 7}], "annotations": []}, "without 'file_name'"),
        ({"images": [3], "annotations": []}, "without 'id'"),
    ],
)
def test_errors_name_the_entry(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(BadData, match=words):
        read_rows(written(tmp_path, content, "annotations"))


def test_missing_images_are_looked_for_and_named(tmp_path: Path) -> None:
    path = written(tmp_path, {"images": IMAGES, "annotations": CAPTIONS}, "elsewhere")
    with pytest.raises(BadData, match=r"a.png is in none of .*train2017.*layout"):
        read_rows(path)


JSON = some.recursive(
    some.none() | some.integers() | some.text(max_size=5),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(images=JSON, annotations=JSON)
def test_anything_else_is_refused(
    tmp_path_factory: pytest.TempPathFactory, images: Any, annotations: Any
) -> None:
    path = tmp_path_factory.mktemp("coco") / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    with contextlib.suppress(BadData):
        rows = read_rows(path)
        assert rows["image"] == rows["caption"] == []
