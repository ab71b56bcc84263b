"""Files with one record a line or a block: csv, tsv, jsonl, json, parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.data.coco import coco_rows, is_coco
from graftwork.data.rows import Rows
from graftwork.errors import BadData, nearest

_LONGEST_FIELD = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a file is laid out, where its suffix does not say.

    Args:
        header: the first line of a csv or tsv file names the columns; without, they are called "0", "1", ...
        delimiter: between fields; None means comma for csv and tab for tsv.
        quoted: fields may be quoted; None means yes for csv, no for tsv, where a quote is a plain character.
        paragraphs: in a plain text file a row is a block between blank lines, not a line.
        images: folder of the image files that COCO annotations name, from the annotations' own folder.
    """

    header: bool = True
    delimiter: str | None = None
    quoted: bool | None = None
    paragraphs: bool = False
    images: str | None = None


def text_of(path: Path) -> str:
    """The file as text without byte-order mark; BadData with the line of the first byte that is not UTF-8."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadData(
            f"{path}: line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}). Convert the file to UTF-8."
        ) from None
    if not text.strip(" \t\r\n"):
        raise BadData(f"{path} is empty")
    return text


def read_delimited(path: Path, layout: Layout) -> Rows:
    """csv or tsv."""
    tab = path.suffix == ".tsv" or layout.delimiter == "\t"
    delimiter = layout.delimiter or ("\t" if tab else ",")
    quoted = layout.quoted if layout.quoted is not None else not tab
    lines = _quoted(path, delimiter) if quoted else _plain(path, delimiter)
    return _table(path, list(lines), layout.header)


def _quoted(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text_of(path), newline=""), delimiter=delimiter, strict=True)
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        raise BadData(f"{path}: line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(before)


def _plain(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines_of(text_of(path)), 1):
        if line:
            yield number, line.split(delimiter)


def lines_of(text: str) -> list[str]:
    """Lines as files mean them: other separators of Unicode are characters like any other."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines and not lines[-1] else lines


def _table(path: Path, lines: Sequence[tuple[int, list[str]]], header: bool) -> Rows:
    width = len(lines[0][1])
    for number, fields in lines:
        if len(fields) != width:
            raise BadData(f"{path}: line {number} has {len(fields)} fields, the lines before have {width}")
    names = (
        [name or str(n) for n, name in enumerate(lines[0][1])] if header else [str(n) for n in range(width)]
    )
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise BadData(f"{path}: column names occur twice: {doubled}. Rename them, or read with header=False.")
    records = lines[1:] if header else lines
    if not records:
        raise BadData(f"{path} has a header and no rows")
    return Rows({name: [fields[n] for _, fields in records] for n, name in enumerate(names)}, str(path))


def read_json_lines(path: Path, wanted: Iterable[str] | None) -> Rows:
    """One JSON object a line. Without `wanted`, all must have the same keys."""
    records = []
    for number, line in enumerate(lines_of(text_of(path)), 1):
        if line.strip():
            records.append((f"line {number}", _parsed(line, f"{path}: line {number}")))
    return _objects(path, records, wanted)


def read_json(path: Path, wanted: Iterable[str] | None, images: str | None = None) -> Rows:
    """One JSON array of objects, or captions in COCO's format."""
    content = _parsed(text_of(path), str(path))
    if is_coco(content):
        return coco_rows(content, path, images)
    if not isinstance(content, list) or not content:
        raise BadData(f"{path}: expected a JSON array of objects, one per row")
    return _objects(path, [(f"item {n}", item) for n, item in enumerate(content)], wanted)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadData(f"{where} is not JSON: {error}") from None


def _objects(path: Path, records: Sequence[tuple[str, Any]], wanted: Iterable[str] | None) -> Rows:
    for where, record in records:
        if not isinstance(record, dict):
            raise BadData(
                f"{path}: {where} is a {type(record).__name__}, expected an object with named fields"
            )
    names = list(records[0][1]) if wanted is None else list(wanted)
    for where, record in records:
        _same_keys(path, where, record, names, wanted is None)
    return Rows({name: [record[name] for _, record in records] for name in names}, str(path))


def _same_keys(path: Path, where: str, record: Mapping[str, Any], names: Sequence[str], all_of: bool) -> None:
    for name in names:
        if name not in record:
            raise BadData(f"{path}: {where} has no {name!r}. {nearest(name, record)}")
    extra = sorted(record.keys() - set(names)) if all_of else []
    if extra:
        raise BadData(f"{path}: {where} has {extra}, which the first row lacks. Choose columns to read.")


def read_parquet(path: Path, wanted: Iterable[str] | None) -> Rows:
    """Parquet, through pyarrow."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        for name in wanted or ():
            if name not in names:
                raise BadData(f"{path} has no column {name!r}. {nearest(name, names)}")
        table = file.read(columns=list(wanted) if wanted is not None else None)
    except pyarrow.ArrowException as error:
        raise BadData(f"{path} is not a readable parquet file: {error}") from None
    return Rows(table.to_pydict(), str(path))
