"""Images with class labels: folders of files, and npz arrays."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

from graftwork.data.rows import Rows
from graftwork.errors import BadData

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_CANONICAL = {"x": "image", "images": "image", "y": "label", "labels": "label"}
_ANY_SPLIT = "|".join(name for names in SPLIT_NAMES.values() for name in names)
_ARRAY = re.compile(rf"(?:(?P<before>{_ANY_SPLIT})_(?P<what>\w+)|(?P<what2>\w+)_(?P<after>{_ANY_SPLIT}))")


def image_classes(folder: Path) -> list[Path]:
    """The sub-folders that hold images."""
    below = sorted(child for child in folder.iterdir() if child.is_dir())
    return [child for child in below if any(f.suffix.lower() in SUFFIXES for f in child.iterdir())]


def read_image_folder(folder: Path) -> Rows:
    """Columns `image` (path of the file, opened when encoded) and `label` (name of its sub-folder)."""
    found = [
        (str(file), kind.name)
        for kind in image_classes(folder)
        for file in sorted(kind.iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise BadData(f"{folder} has no sub-folders with images; expected {folder}/CLASS/NAME.png")
    return Rows({"image": [file for file, _ in found], "label": [kind for _, kind in found]}, str(folder))


def npz_splits(path: Path) -> tuple[str, ...]:
    """The parts that the names of the arrays speak of (`train_images`, `x_test`)."""
    found = {_split_and_name(name)[0] for name in _names(path)}
    return tuple(split for split in SPLIT_NAMES if split in found)


def read_npz(path: Path, split: str | None) -> Rows:
    """One column per array of the split.

    `train_images`, `x_train`, `x` and `images` become `image`; `train_labels`, `y_train`, `y` and `labels`
    become `label`; other names stay. Labels of shape (n, 1) become (n,).
    """
    parts = npz_splits(path)
    if parts and split is None:
        raise BadData(f"{path} holds {', '.join(parts)}: say which split")
    arrays: dict[str, Any] = {}
    for name in _names(path):
        part, what = _split_and_name(name)
        if part == split:
            arrays[_CANONICAL.get(what, what)] = _array(path, name)
    if not arrays:
        raise BadData(f"{path} has no arrays for {split!r}; it holds {', '.join(_names(path))}")
    return Rows(
        {name: _column(values) for name, values in arrays.items()}, f"{path}[{split}]" if split else str(path)
    )


def _split_and_name(array: str) -> tuple[str | None, str]:
    match = _ARRAY.fullmatch(array)
    if not match:
        return None, array
    word = match["before"] or match["after"]
    split = next(split for split, names in SPLIT_NAMES.items() if word in names)
    return split, match["what"] or match["what2"]


def _column(values: Any) -> list[Any]:
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    return values.tolist() if values.ndim <= 1 else list(values)


def _names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except zipfile.BadZipFile:
        raise BadData(f"{path} is not an npz file, or it is damaged") from None


def _array(path: Path, name: str) -> Any:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            return np.atleast_1d(archive[name])
    except ValueError as error:
        raise BadData(f"{path}: array {name!r} cannot be read without unpickling: {error}") from None
