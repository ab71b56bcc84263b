"""The embedded sets: disjoint parts, no leaks, no imports, and a task that can be learnt but is not
trivial."""

import sys
from collections import Counter

import pytest

from graftwork.data import docstrings, embedded
from graftwork.data.readers import read_rows
from graftwork.data.subjects import SUBJECTS

PARTS = ("train", "validation", "test")


def _normal(text):
    return " ".join(text.lower().split())


@pytest.mark.slow
def test_collecting_imports_nothing_new():
    before = set(sys.modules)
    assert len(docstrings.collect()) > 4000
    assert all(name.startswith("_sysconfigdata") for name in set(sys.modules) - before)
    assert not {"antigravity", "this", "tkinter", "turtle"} & set(sys.modules)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in embedded.SETS if name != "docstrings"])
def test_parts_share_no_row(name):
    parts = [read_rows(name, split=split) for split in PARTS]
    if name.startswith("digits"):
        total = sum(map(len, parts))
        assert (
            len({(image.tobytes(), said) for p in parts for image, said in zip(p["image"], p[p.names[1]])})
            == total
        )
        return
    texts = [{_normal(text) for text in part[part.names[0]]} for part in parts]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]
    sizes = [len(part) / sum(map(len, parts)) for part in parts]
    assert 0.55 < sizes[0] < 0.8
    assert min(sizes[1:]) > 0.08


@pytest.mark.slow
def test_no_class_straddles_the_parts_and_by_module_no_module():
    groups = [{d.definition for d in embedded._chosen(s, 0, lambda d: d.definition)} for s in PARTS]
    assert not groups[0] & (groups[1] | groups[2])
    modules = [set(embedded.subjects(split, by_module=True)["module"]) for split in PARTS]
    assert not modules[0] & (modules[1] | modules[2])


@pytest.mark.slow
def test_subjects_are_balanced_enough_and_neither_trivial_nor_hopeless():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, test = (embedded.subjects(split) for split in ("train", "test"))
    share = [count / len(train) for count in Counter(train["label"]).values()]
    assert len(share) == len(SUBJECTS) == 7
    assert min(share) > 0.08
    assert max(share) < 0.3
    words = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=200))
    assert 0.6 < words.fit(train["text"], train["label"]).score(test["text"], test["label"]) < 0.9


@pytest.mark.slow
def test_pairs_do_not_contain_their_answer():
    rows = embedded.retrieval("test")
    assert all(query not in document for query, document in zip(rows["query"], rows["document"]))
    assert len(set(rows["query"])) == len(rows)


def test_draws_depend_on_seed_and_group_alone():
    first = [embedded.part_of(f"group {n}", 0) for n in range(3000)]
    shares = {part: count / 3000 for part, count in Counter(first).items()}
    assert shares == pytest.approx({"train": 0.70, "validation": 0.15, "test": 0.15}, abs=0.03)
    assert first != [embedded.part_of(f"group {n}", 1) for n in range(3000)]


def test_digits_halves_have_their_classes():
    low, high = embedded.SETS["digits:low"]("test"), embedded.SETS["digits:high"]("test")
    assert (set(low["label"]), set(high["label"])) == (set(range(5)), set(range(5, 10)))
    assert low["image"][0].shape == (8, 8)
    assert max(image.max() for image in low["image"]) == 255


def test_captions_name_the_digit_in_one_of_three_sentences():
    captions, plain = embedded.SETS["digits:captions"]("train"), embedded.SETS["digits"]("train")
    assert all((a == b).all() for a, b in zip(captions["image"], plain["image"], strict=True))
    counts = dict.fromkeys(embedded.SENTENCES, 0)
    for said, label in zip(captions["caption"], plain["label"], strict=True):
        (sentence,) = [s for s in embedded.SENTENCES if s.format(embedded.DIGITS[label]) == said]
        counts[sentence] += 1
    assert min(counts.values()) > 0.25 * len(captions)


def test_docstrings_are_read_by_name_summary_and_body(tmp_path):
    path = tmp_path / "mod.py"
    body = '        """Do.\n\n        More\n          deep.\n        """\n'
    path.write_text('"""About\nit."""\nclass A:\n    def f(self):\n' + body)
    found = list(docstrings._of_module(path, "json.mod"))
    assert [(d.name, d.summary, d.body, d.definition) for d in found] == [
        ("", "About it.", "", "json.mod:"),
        ("A.f", "Do.", "More\n  deep.", "json.mod:A"),
    ]
    assert found[0].subject == "text and markup"
