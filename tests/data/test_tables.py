"""csv, tsv, jsonl, json and parquet: round trips against Python's own writers, and what is said about bad
files."""

import csv
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graftwork.data.readers import read_rows
from graftwork.data.tables import Layout
from graftwork.errors import BadData

FAST = settings(max_examples=40, deadline=None)
CHARACTERS = st.characters(codec="utf-8")
QUOTED = st.text(CHARACTERS.filter(lambda c: c not in "\r\x00"), min_size=1, max_size=12)
PLAIN = st.text(CHARACTERS.filter(lambda c: c not in "\r\n\t\x00\ufeff"), min_size=1, max_size=12)
JSON = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(CHARACTERS, max_size=12)
)


def tables(cell):
    return st.integers(1, 3).flatmap(lambda w: st.lists(st.tuples(*[cell] * w), min_size=1, max_size=6))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@FAST
@given(records=tables(QUOTED))
def test_csv_returns_what_was_written(folder, records):
    path, names = folder / "t.csv", [f"c{n}" for n in range(len(records[0]))]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *records])
    rows = read_rows(path)
    assert rows.names == tuple(names)
    assert [tuple(row.values()) for row in rows] == records


@FAST
@given(records=tables(PLAIN))
@example(records=[("\x85",)])  # a separator of Unicode, not of files
def test_tsv_returns_what_was_written_quotes_and_all(folder, records):
    path = folder / "t.tsv"
    path.write_text("".join("\t".join(record) + "\n" for record in records), encoding="utf-8", newline="")
    rows = read_rows(path, layout=Layout(header=False))
    assert rows.names == tuple(str(n) for n in range(len(records[0])))
    assert [tuple(row.values()) for row in rows] == records


@FAST
@given(
    records=st.lists(
        st.fixed_dictionaries({"a": JSON, "b": st.lists(JSON, max_size=3)}), min_size=1, max_size=5
    )
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_jsonl_returns_what_was_written(folder, records, ascii_only):
    path = folder / "t.jsonl"
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    assert list(read_rows(path)) == records
    path = folder / "t.json"
    path.write_text(json.dumps(records, ensure_ascii=ascii_only), encoding="utf-8")
    assert list(read_rows(path)) == records


def test_parquet_and_choice_of_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"sentence": ["a", "b"], "gold": [1, 0], "other": [None, 2.5]}), path)
    rows = read_rows(path, columns={"text": "sentence", "label": "gold"})
    assert list(rows) == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    with pytest.raises(BadData, match=r"no column 'golt'.*gold"):
        read_rows(path, columns={"label": "golt"})
    path.write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(BadData, match="not a readable parquet"):
        read_rows(path)


def test_header_less_columns_by_number_and_other_delimiters(tmp_path):
    path = tmp_path / "cola.tsv"
    path.write_text('gj04\t1\t\tIt "works.\ngj04\t0\t*\tIt work.\n')
    rows = read_rows(path, columns={"text": 3, "label": 1}, layout=Layout(header=False))
    assert list(rows) == [{"text": 'It "works.', "label": "1"}, {"text": "It work.", "label": "0"}]
    path = tmp_path / "semi.csv"
    path.write_text("a;b\n1;2\n")
    assert list(read_rows(path, layout=Layout(delimiter=";"))) == [{"a": "1", "b": "2"}]


def test_byte_order_mark_windows_lines_and_unnamed_column(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbf,text\r\n0,caf\xc3\xa9\r\n")
    assert list(read_rows(path)) == [{"0": "0", "text": "café"}]


BAD = {
    "ragged.csv": (b"a,b\n1,2\n3\n", "line 3 has 1 fields"),
    "ragged.tsv": (b"a\tb\n1\t2\n3\t4\t5\n", "line 3 has 3 fields"),
    "late-quote.csv": (b'a,b\n1,"2\n', "line 2"),
    "encoding.csv": (b"a\nok\ncaf\xe9\n", "line 3 is not UTF-8 .byte 0xe9"),
    "empty.csv": (b"", "is empty"),
    "blank.jsonl": (b"\n \n", "is empty"),
    "header.csv": (b"a,b\n", "a header and no rows"),
    "doubled.csv": (b"a,a\n1,2\n", "occur twice"),
    "broken.jsonl": (b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
    "deep.jsonl": (b"[" * 100_000, "line 1 is not JSON"),
    "array.jsonl": (b'{"a": 1}\n[1]\n', "line 2 is a list"),
    "missing.jsonl": (b'{"a": 1, "b": 2}\n{"a": 1}\n', "line 2 has no 'b'"),
    "more.jsonl": (b'{"a": 1}\n{"a": 1, "b": 2}\n', "line 2 has .*b.*first row lacks"),
    "object.json": (b'{"a": 1}', "expected a JSON array"),
    "what.xyz": (b"a", "unknown kind of file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_told_with_their_line(tmp_path, name):
    content, said = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadData, match=said) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


def test_long_fields_are_read_and_the_global_limit_stays(tmp_path):
    before, path = csv.field_size_limit(), tmp_path / "long.csv"
    path.write_text("a\n" + "x" * 300_000 + "\n")
    assert len(read_rows(path)["a"][0]) == 300_000
    assert csv.field_size_limit() == before


def test_keys_of_some_rows_only_are_fine_when_columns_are_chosen(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1, "b": 2}\n{"a": 3}\n')
    assert list(read_rows(path, columns={"x": "a"})) == [{"x": 1}, {"x": 3}]
    with pytest.raises(BadData, match="line 2 has no 'b'"):
        read_rows(path, columns={"x": "b"})
