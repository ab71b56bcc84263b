"""Captions in COCO's annotation format: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftwork.data.rows import Rows
from graftwork.errors import BadData


def is_coco(content: Any) -> bool:
    """Whether the content of a JSON file is a set of COCO annotations."""
    return isinstance(content, Mapping) and {"images", "annotations"} <= content.keys()


def coco_rows(content: Mapping[str, Any], path: Path, images: str | None) -> Rows:
    """Columns `image` (path of the file) and `caption`, one row for each annotation.

    Args:
        images: folder of the image files, from the annotations' own; None tries that folder, then the one that COCO
            lays beside it (`annotations/captions_train2017.json` and `train2017/`).
    """
    files = {
        _field(entry, "id", int | str, path): _field(entry, "file_name", str, path)
        for entry in _listed(content, "images", path)
    }
    rows = [
        (_field(entry, "image_id", int | str, path), _field(entry, "caption", str, path))
        for entry in _listed(content, "annotations", path)
    ]
    unknown = [image for image, _ in rows if image not in files]
    if unknown:
        raise BadData(
            f"{path}: {len(unknown)} annotations of images that it does not list, {unknown[0]!r} for one"
        )
    folder = _folder(path, images, [files[image] for image, _ in rows[:1]])
    return Rows(
        {
            "image": [str(folder / files[image]) for image, _ in rows],
            "caption": [caption.strip() for _, caption in rows],
        },
        str(path),
    )


def _listed(content: Mapping[str, Any], name: str, path: Path) -> list[Any]:
    found = content[name]
    if not isinstance(found, list):
        raise BadData(f"{path}: {name!r} is a {type(found).__name__}, in COCO's format a list")
    return found


def _field(entry: Any, name: str, kind: Any, path: Path) -> Any:
    if not isinstance(entry, Mapping) or not isinstance(entry.get(name), kind):
        raise BadData(
            f"{path}: an entry without {name!r} of type {getattr(kind, '__name__', kind)}; COCO's captions have images "
            "(id, file_name) and annotations (image_id, caption)"
        )
    return entry[name]


def _folder(path: Path, images: str | None, some: list[str]) -> Path:
    if images is not None:
        tried = [path.parent / images]
    else:
        tried = [path.parent, path.parent.parent / path.stem.rpartition("_")[2]]
    for folder in tried:
        if all((folder / name).is_file() for name in some):
            return folder
    raise BadData(
        f"{path}: image {some[0]} is in none of {', '.join(map(str, tried))}; say where: layout: {{images: FOLDER}}"
    )
