"""One door to all data: files by suffix, folders, embedded sets by name, hub names when online."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from graftwork.data import embedded
from graftwork.data.images import SPLIT_NAMES, image_classes, npz_splits, read_image_folder, read_npz
from graftwork.data.rows import Rows
from graftwork.data.tables import Layout, read_delimited, read_json, read_json_lines, read_parquet
from graftwork.data.texts import read_conllu, read_text
from graftwork.errors import BadData, nearest

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt", ".conllu", ".npz")


def read_rows(
    source: str | Path,
    *,
    split: str | None = None,
    columns: Mapping[str, str | int] | None = None,
    layout: Layout | None = None,
) -> Rows:
    """Rows of a file, a folder, an embedded set (`docstrings:subjects`) or a hub name (`owner/set`).

    Args:
        source: where the rows are. A folder holds `train.*`, `dev.*` and `test.*` files, or one sub-folder of
            images per class (below `train/`, `test/`, or directly).
        split: `train`, `validation` or `test`, of a source that has parts.
        columns: name wanted -> name in the source (or number of the field, from 0); others are left out. None
            keeps all under their own names.
        layout: header, delimiter, quotes, paragraphs, where the suffix does not say.

    Raises BadData: nothing there, unreadable, a missing column, ragged rows; with file and line.
    """
    if split is not None and split not in SPLIT_NAMES:
        raise BadData(f"no split is called {split!r}. {nearest(split, SPLIT_NAMES)}")
    wanted = {name: str(column) for name, column in columns.items()} if columns else None
    rows = _read(str(source), split, list(wanted.values()) if wanted else None, layout or Layout())
    return rows.pick(wanted) if wanted else rows


def splits_of(source: str | Path) -> tuple[str, ...]:
    """The parts a source has of its own, () where it is one table."""
    path, name = Path(source), str(source)
    if name in embedded.SETS:
        return tuple(SPLIT_NAMES)
    if path.is_dir():
        return tuple(split for split in SPLIT_NAMES if _inside(path, split))
    if path.suffix == ".npz" and path.is_file():
        return npz_splits(path)
    if path.exists() or _looks_local(name):
        return ()
    return _hub_splits(name)


def _read(source: str, split: str | None, wanted: Sequence[str] | None, layout: Layout) -> Rows:
    path = Path(source)
    if source in embedded.SETS:
        return embedded.load(source, split)
    if path.is_dir():
        return _read_folder(path, split, wanted, layout)
    if path.is_file():
        return _read_file(path, split, wanted, layout)
    if _looks_local(source):
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise BadData(f"there is no file or folder {source}. {nearest(path.name, beside)}")
    return _read_hub(source, split)


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or Path(source).suffix in SUFFIXES or source.count("/") > 1


def _read_file(path: Path, split: str | None, wanted: Sequence[str] | None, layout: Layout) -> Rows:
    if path.suffix == ".npz":
        return read_npz(path, split)
    if split is not None:
        raise BadData(f"{path} is one table and has no split {split!r}; name a file for each split")
    match path.suffix:
        case ".csv" | ".tsv":
            return read_delimited(path, layout)
        case ".jsonl":
            return read_json_lines(path, wanted)
        case ".json":
            return read_json(path, wanted, layout.images)
        case ".parquet":
            return read_parquet(path, wanted)
        case ".txt":
            return read_text(path, layout.paragraphs)
        case ".conllu":
            return read_conllu(path)
    raise BadData(f"{path}: unknown kind of file {path.suffix!r}; readable are {', '.join(SUFFIXES)}")


def _read_folder(folder: Path, split: str | None, wanted: Sequence[str] | None, layout: Layout) -> Rows:
    if split is None:
        if image_classes(folder):
            return read_image_folder(folder)
        raise BadData(f"{folder} is a folder without class folders of images: name a file in it, or a split")
    found = _inside(folder, split)
    if found is None:
        raise BadData(f"{folder} has no {split!r} part ({', '.join(SPLIT_NAMES[split])} with a known suffix)")
    return read_image_folder(found) if found.is_dir() else _read_file(found, None, wanted, layout)


def _inside(folder: Path, split: str) -> Path | None:
    """The file or folder of a split inside a folder."""
    found = [
        child
        for child in sorted(folder.iterdir())
        if child.stem in SPLIT_NAMES[split] and (child.is_dir() or child.suffix in SUFFIXES)
    ]
    if len(found) > 1:
        raise BadData(f"{folder} has several {split!r} parts: {', '.join(f.name for f in found)}; name one")
    return found[0] if found else None


def _hub_splits(name: str) -> tuple[str, ...]:
    if _offline():
        return ()
    from datasets import get_dataset_split_names

    owner, _, configuration = name.partition(":")
    try:
        found = get_dataset_split_names(owner, configuration or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreachable(name, str(error)) from None
    return tuple(split for split in SPLIT_NAMES if split in found)


def _read_hub(name: str, split: str | None) -> Rows:
    if _offline():
        raise _unreachable(name, "the hub is switched off (HF_HUB_OFFLINE)")
    from datasets import load_dataset

    owner, _, configuration = name.partition(":")
    try:
        table = load_dataset(owner, configuration or None, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreachable(name, str(error)) from None
    return Rows({column: table[column][:] for column in table.column_names}, f"{name}[{split or 'train'}]")


def _offline() -> bool:
    return any(
        os.environ.get(v, "").lower() in {"1", "true", "yes", "on"}
        for v in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )


def _unreachable(name: str, reason: str) -> BadData:
    return BadData(
        f"{name!r} is no file, no folder, no embedded data set ({nearest(name, embedded.SETS)}), and "
        f"as a hub name it cannot be read: {reason[:300]}"
    )
