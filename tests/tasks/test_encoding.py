"""Examples and batches of the tasks that label a text, its words, or an image."""

import logging
import pickle

import numpy as np
import pytest
import torch
from small_tokenizers import word_tokenizer

from graftwork.data.rows import Rows
from graftwork.errors import BadData, BadOption, UnknownName
from graftwork.tasks.base import IGNORED
from graftwork.tasks.image_classification import rgb
from graftwork.tasks.registry import make_task, task_class, tasks

WORDS = word_tokenizer("a b c d e", pieces=("##b", "##c"))
TEXTS = Rows({"text": ["a b c d e", "a"], "label": ["no", "yes"]}, "mine")


def test_registry_knows_the_seven_and_helps_after_a_typo():
    assert {
        "causal-lm",
        "image-classification",
        "masked-lm",
        "regression",
        "seq2seq",
        "text-classification",
        "token-classification",
    } <= set(tasks())
    assert all(kind.best_metric and kind.model_class for kind in tasks().values())
    with pytest.raises(UnknownName, match="Did you mean regression"):
        task_class("regresion")
    with pytest.raises(UnknownName, match=r"no option 'max_lenght'. Did you mean max_length"):
        make_task("causal-lm", {"max_lenght": 3})
    with pytest.raises(BadOption, match="at least 4"):
        make_task("causal-lm", {"max_length": 1})


@pytest.mark.parametrize("name", sorted(tasks()))
def test_options_make_the_same_task_again(name):
    task = make_task(name, {"labels": ["a", "b"]})
    assert make_task(name, task.options()) == task
    assert pickle.loads(pickle.dumps(task)) == task


def test_truncation_is_counted_and_logged(caplog):
    task = make_task("text-classification", {"max_length": 4}).fit(TEXTS)
    with caplog.at_level(logging.WARNING):
        encoded = task.encode(TEXTS, WORDS)
    assert (encoded.truncated, encoded.tokens_cut) == (1, 3)
    assert [len(item["input_ids"]) for item in encoded.items] == [4, 3]
    assert encoded.items[0]["input_ids"] == WORDS("a b")["input_ids"]
    assert "mine: 2 examples, 1 truncated (3 tokens cut)" in caplog.text


def test_the_tokenizer_s_own_limit_wins():
    short = word_tokenizer("a b c d e", most=5)
    encoded = make_task("text-classification").fit(TEXTS).encode(TEXTS, short)
    assert max(len(item["input_ids"]) for item in encoded.items) == 5


def test_pairs_become_one_input_with_two_segments():
    rows = Rows({"text": ["a b"], "pair": ["c"], "label": [1.5]})
    (item,) = make_task("regression").encode(rows, WORDS).items
    assert item["input_ids"] == WORDS("a b", "c")["input_ids"]
    assert item["token_type_ids"] == [0, 0, 0, 0, 1, 1]


def test_batches_are_padded_as_the_tokenizer_pads():
    task = make_task("text-classification").fit(TEXTS)
    collate = pickle.loads(pickle.dumps(task.collator(WORDS)))
    batch = collate(task.encode(TEXTS, WORDS).items)
    expected = WORDS(list(TEXTS["text"]), padding=True, return_tensors="pt")
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert batch["labels"].tolist() == [0, 1]
    assert batch["labels"].dtype == torch.int64


def test_label_names_are_ordered_and_one_whatever_their_type():
    rows = Rows({"text": ["a"] * 4, "label": ["10", 9, 1.0, np.int64(9)]})
    task = make_task("text-classification").fit(rows)
    assert task.labels == ("1", "9", "10")
    assert [item["labels"] for item in task.encode(rows, WORDS).items] == [2, 1, 0, 1]
    assert (task.id2label[2], task.label2id["10"], task.outputs) == ("10", 2, 3)


def test_labels_unseen_in_train_and_other_bad_rows():
    task = make_task("text-classification").fit(TEXTS)
    with pytest.raises(BadData, match=r"theirs: 1 label\(s\) unseen in train: 'maybe' \(row 1\)"):
        task.encode(Rows({"text": ["a", "b"], "label": ["no", "maybe"]}, "theirs"), WORDS)
    with pytest.raises(BadData, match="needs two labels"):
        make_task("text-classification").fit(TEXTS.head(1))
    with pytest.raises(BadData, match=r"needs a column 'text'.*mine has label"):
        task.encode(TEXTS.pick({"label": "label"}), WORDS)
    with pytest.raises(BadData, match="no rows"):
        task.encode(TEXTS.select([]), WORDS)
    for bad in ("high", None, float("nan")):
        with pytest.raises(BadData, match="row 1 is not a finite number"):
            make_task("regression").encode(Rows({"text": ["a", "b"], "label": ["0.5", bad]}), WORDS)


def test_only_the_first_piece_of_a_word_carries_its_tag():
    rows = Rows({"tokens": [["a", "ab", "c"], ["b"]], "tags": [["X", "Y", "X"], ["Y"]]})
    task = make_task("token-classification").fit(rows)
    one, two = task.encode(rows, WORDS).items
    assert WORDS.convert_ids_to_tokens(one["input_ids"]) == ["[CLS]", "a", "a", "##b", "c", "[SEP]"]
    assert one["labels"] == [IGNORED, 0, 1, IGNORED, 0, IGNORED]
    batch = task.collator(WORDS)([one, two])
    assert batch["labels"][1].tolist() == [IGNORED, 1, IGNORED, IGNORED, IGNORED, IGNORED]
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), 2).float()
    kept = task.preprocess_logits((logits, "cache"), batch["labels"])
    assert task.metrics(kept.numpy(), batch["labels"].numpy(), WORDS)["accuracy"] == 1.0
    cut = make_task("token-classification", {"max_length": 4}).fit(rows).encode(rows, WORDS)
    assert (cut.truncated, cut.tokens_cut) == (1, 2)


def test_span_tags_are_scored_as_spans():
    rows = Rows({"tokens": [["a", "b", "c"]], "tags": [["B-P", "I-P", "O"]]})
    task = make_task("token-classification").fit(rows)
    labels = task.collator(WORDS)(task.encode(rows, WORDS).items)["labels"].numpy()
    assert task.metrics(labels, labels, WORDS)["span_f1"] == 1.0
    wrong = np.where(labels == task.label2id["I-P"], task.label2id["O"], labels)
    assert task.metrics(wrong, labels, WORDS)["span_f1"] == 0.0


@pytest.mark.parametrize(
    ("tokens", "tags", "said"),
    [([["a", "b"]], [["X"]], "row 0 has 2 tokens and 1 tags"), (["a b"], [["X"]], "must be lists")],
)
def test_tags_must_fit_their_words(tokens, tags, said):
    task = make_task("token-classification", {"labels": ["X", "Y"]})
    with pytest.raises(BadData, match=said):
        task.encode(Rows({"tokens": tokens, "tags": tags}), WORDS)


def test_images_of_every_kind_become_the_same_bytes(tmp_path):
    from PIL import Image

    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
    expected = np.stack([grey] * 3, axis=-1)
    Image.fromarray(grey).save(tmp_path / "i.png")
    alpha = np.concatenate([expected, np.zeros((4, 4, 1), np.uint8)], axis=-1)
    for image in (
        grey,
        grey[:, :, None],
        expected,
        alpha,
        grey.astype(np.int64),
        grey / 255,
        str(tmp_path / "i.png"),
        Image.open(tmp_path / "i.png"),
    ):
        np.testing.assert_array_equal(rgb(image), expected)
    for bad in (np.zeros((4, 4, 2)), np.zeros(3), grey.astype(float) - 300):
        with pytest.raises(BadData, match="an image"):
            rgb(bad)


def test_image_batches_and_files_that_are_no_images(tmp_path):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": 6, "width": 6})
    rows = Rows({"image": [np.full((4, 4), 255, np.uint8), np.zeros((5, 5), np.uint8)], "label": [1, 0]})
    task = make_task("image-classification").fit(rows)
    encoded = task.encode(rows, processor)
    batch = task.collator(processor)([encoded[0], encoded[1]])
    assert batch["pixel_values"].shape == (2, 3, 6, 6)
    assert batch["pixel_values"].mean((1, 2, 3)).tolist() == pytest.approx([1.0, -1.0])
    assert batch["labels"].tolist() == [1, 0]
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(BadData, match=r"row 0: .*x.png is not a readable image"):
        task.encode(Rows({"image": [str(tmp_path / "x.png")], "label": [1]}), processor)
