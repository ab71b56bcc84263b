"""Real data sets in the formats they come in, where they are at hand ($GRAFTWORK_DATA)."""

import os
from pathlib import Path

import pytest

from graftwork.data.readers import read_rows
from graftwork.data.splits import read_splits
from graftwork.data.tables import Layout

ROOT = Path(__file__).resolve().parents[2]
DATA = (ROOT / os.environ.get("GRAFTWORK_DATA", "../shared/data")).resolve()
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}")

PAIR = {"text": "sentence1", "pair": "sentence2"}
SPLIT = {
    "sst2": (None, (15000, 2000, 449)),
    "rte": ({**PAIR, "label": "label"}, (1041, 178, 123)),
    "sick": ({**PAIR, "label": "score"}, (2278, 245, 2445)),
    "trec": ({"text": "text", "label": "fine_label"}, (2470, 274, 234)),
    "pneumoniamnist/pneumoniamnist.npz": (None, (1863, 263, 317)),
    "mnist/mnist.npz": (None, (3567, 396, 997)),
}
SINGLE = {
    "crows-pairs/crows_pairs_anonymized.csv": ({"text": "sent_more"}, 1508),
    "cranfield/qrels.tsv": (None, 810),
    "icelandic-ud/pud.jsonl": ({"tokens": "tokens", "tags": "upos"}, 1000),
    "omniglot/omniglot28.npz": ({"image": "image", "label": "alphabet"}, 2420),
}


@pytest.mark.parametrize("name", SPLIT)
def test_sets_with_parts(name):
    columns, sizes = SPLIT[name]
    splits = read_splits(str(DATA / name), columns=columns)
    assert tuple(len(part) for part in (splits.train, splits.validation, splits.test)) == sizes
    assert "label" in splits.train


@pytest.mark.parametrize("name", SINGLE)
def test_single_tables(name):
    columns, size = SINGLE[name]
    assert len(read_rows(DATA / name, columns=columns)) == size


def test_running_text_by_line_and_by_paragraph():
    lines = read_rows(DATA / "wikitext-2", split="validation")
    paragraphs = read_rows(DATA / "tiny-shakespeare/input.txt", layout=Layout(paragraphs=True))
    assert len(lines) == 2461
    assert paragraphs["text"][0].startswith("First Citizen:\nBefore we proceed")
