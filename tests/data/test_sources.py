"""Texts, images, folders, names: what `read_rows` and `read_splits` take."""

import numpy as np
import pytest

from graftwork.data.readers import read_rows, splits_of
from graftwork.data.rows import Rows
from graftwork.data.splits import draw, held_out, read_splits
from graftwork.data.tables import Layout
from graftwork.errors import BadData

CONLLU = """# text = Vámonos
1-2\tVámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tVamos\tir\tVERB\tV\t_\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\tP\t_\t1\tobj\t_\t_
2.1\t_\tempty\t_\t_\t_\t_\t_\t_\t_

# text = no
1\tno\tno\tADV\tR\t_\t0\troot\t_\t_
"""


def test_text_by_line_and_by_paragraph(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("one\ntwo\u2028still two\n\n\nthree\n")
    assert read_rows(path)["text"] == ["one", "two\u2028still two", "three"]
    assert read_rows(path, layout=Layout(paragraphs=True))["text"] == ["one\ntwo\u2028still two", "three"]


def test_conllu_keeps_words_and_leaves_ranges_and_empty_nodes_out(tmp_path):
    path = tmp_path / "t.conllu"
    path.write_text(CONLLU)
    rows = read_rows(path, columns={"tokens": "tokens", "tags": "upos"})
    assert list(rows) == [
        {"tokens": ["Vamos", "nos"], "tags": ["VERB", "PRON"]},
        {"tokens": ["no"], "tags": ["ADV"]},
    ]
    path.write_text(CONLLU.replace("\troot\t_\t_\n", "\troot\n", 1))
    with pytest.raises(BadData, match="line 3 has 8 fields"):
        read_rows(path)


def _arrays(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 255, (count, 4, 4), dtype=np.uint8), rng.integers(0, 3, (count, 1), dtype=np.uint8)


@pytest.mark.parametrize("pattern", ["{split}_{what}", "{what}_{split}"])
def test_npz_with_parts_in_either_order(tmp_path, pattern):
    path, arrays = tmp_path / "m.npz", {}
    for seed, (split, count) in enumerate([("train", 5), ("val", 3), ("test", 2)]):
        (
            arrays[pattern.format(split=split, what="images")],
            arrays[pattern.format(split=split, what="labels")],
        ) = _arrays(count, seed)
    np.savez(path, **arrays)
    assert splits_of(path) == ("train", "validation", "test")
    rows = read_rows(path, split="validation")
    images, labels = _arrays(3, 1)
    assert rows.names == ("image", "label")
    assert rows["label"] == labels[:, 0].tolist()
    np.testing.assert_array_equal(np.stack(rows["image"]), images)
    with pytest.raises(BadData, match="say which split"):
        read_rows(path)
    splits = read_splits(str(path))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [5, 3, 2]


def test_npz_without_parts_and_with_names_of_its_own(tmp_path):
    images, labels = _arrays(4)
    np.savez(tmp_path / "p.npz", x=images, y=labels)
    assert read_rows(tmp_path / "p.npz").names == ("image", "label")
    np.savez(tmp_path / "o.npz", images=images, drawer=labels)
    rows = read_rows(tmp_path / "o.npz", columns={"image": "image", "label": "drawer"})
    assert rows["label"] == labels[:, 0].tolist()


def test_npz_never_unpickles_and_says_when_it_is_damaged(tmp_path):
    path = tmp_path / "o.npz"
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BadData, match="unpickling"):
        read_rows(path)
    path.write_bytes(b"PK nonsense")
    with pytest.raises(BadData, match="damaged"):
        read_rows(path)


def test_image_folder_with_and_without_parts(tmp_path):
    from PIL import Image

    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            (tmp_path / part / kind).mkdir(parents=True)
            Image.new("L", (4, 4)).save(tmp_path / part / kind / "1.png")
            (tmp_path / part / kind / "notes.md").write_text("not an image")
    assert splits_of(tmp_path) == ("train", "test")
    rows = read_rows(tmp_path, split="train")
    assert rows["label"] == ["cat", "dog"]
    assert rows["image"][0].endswith("train/cat/1.png")
    assert len(read_rows(tmp_path / "test")) == 2
    with pytest.raises(BadData, match="no 'validation' part"):
        read_rows(tmp_path, split="validation")


def test_folder_of_files_finds_its_parts(tmp_path):
    for name in ("train.csv", "dev.csv"):
        (tmp_path / name).write_text(f"text,label\n{name},1\n")
    splits = read_splits(str(tmp_path))
    assert splits.train["text"] == ["train.csv"]
    assert splits.validation["text"] == ["dev.csv"]
    assert splits.test is None
    (tmp_path / "train.tsv").write_text("a\n1\n")
    with pytest.raises(BadData, match=r"several 'train' parts: train.csv, train.tsv"):
        read_rows(tmp_path, split="train")


def test_names_that_are_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "train.csv").write_text("a\n1\n")
    with pytest.raises(BadData, match=r"no file or folder.*Did you mean train.csv"):
        read_rows(tmp_path / "trian.csv")
    with pytest.raises(BadData, match=r"docstrings:subjects.*HF_HUB_OFFLINE"):
        read_rows("docstrings:subject", split="train")
    with pytest.raises(BadData, match="no split is called 'dev'"):
        read_rows("digits", split="dev")
    with pytest.raises(BadData, match="say which split"):
        read_rows("digits")
    with pytest.raises(BadData, match="is one table"):
        read_rows(tmp_path / "train.csv", split="train")


def test_held_out_rows_and_training_rows_are_a_partition():
    rows = Rows({"text": list("abcdefghij")})
    train, valid = held_out(rows, 0.3, seed=1)
    assert len(valid) == 3
    assert sorted([*train["text"], *valid["text"]]) == rows["text"]
    assert held_out(rows, 0.3, seed=1)[1] == valid
    assert held_out(rows, 0.3, seed=2)[1] != valid
    assert [len(part) for part in held_out(rows.head(2), 0.01, 0)] == [1, 1]
    with pytest.raises(BadData, match="cannot be split"):
        held_out(rows.head(1), 0.5, 0)


def test_explicit_sources_limits_and_no_validation(tmp_path):
    for name, count in (("a.csv", 20), ("b.csv", 7)):
        (tmp_path / name).write_text("text\n" + "".join(f"{name}{n}\n" for n in range(count)))
    splits = read_splits(str(tmp_path / "a.csv"), test=str(tmp_path / "b.csv"), hold_out=0.25, limit=5)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [5, 5, 5]
    assert not set(splits.train["text"]) & set(splits.validation["text"])
    assert read_splits(str(tmp_path / "a.csv"), hold_out=0).validation is None


def test_rows_refuse_what_does_not_fit():
    rows = Rows({"text": ["a"], "label": [1]}, "mine")
    assert rows.row(0) == {"text": "a", "label": 1}
    assert draw(rows, None, 0) is rows
    with pytest.raises(BadData, match=r"mine has no column 'lable'. Did you mean label"):
        rows["lable"]
    with pytest.raises(BadData, match="differ in length"):
        Rows({"a": [1], "b": []})
    with pytest.raises(BadData, match="row 1 has"):
        Rows.of([{"a": 1}, {"b": 1}])
