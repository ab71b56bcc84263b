"""Small hosts: size, tokenizer, pretraining that learns, repeats, and never leaves half a folder."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from graftwork.data import embedded
from graftwork.data.rows import Rows
from graftwork.errors import BadOption, UnknownName
from graftwork.models import lessons, pretraining
from graftwork.models.base import load_base
from graftwork.models.hosts import HOSTS
from graftwork.models.pretraining import host_folder, pretrain
from graftwork.models.vocabulary import train_tokenizer
from graftwork.tasks.registry import make_task

TEXTS = [
    f"the {a} of the {b} is a {c}.\n\n    >>> {a}({b!r})\n"
    for a in ("list", "file", "day")
    for b in "xyz"
    for c in ("key", "set")
]
SHRINK = {
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "t5": {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "d_kv": 8},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 2},
    "vit": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
}
TASK = {"causal": "causal-lm", "spans": "seq2seq", "images": "image-classification"}


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """Little text, narrow hosts, a cache of its own, one thread."""
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path))
    monkeypatch.setattr(
        embedded, "text", lambda split: Rows({"text": TEXTS * (6 if split == "train" else 2)})
    )
    monkeypatch.setattr(lessons, "_VALIDATION_BATCHES", 2)
    for name, host in HOSTS.items():
        config = _narrow(host.config().to_dict(), SHRINK[name.removeprefix("tiny-")], type(host.config()))
        length = host.length if host.objective == "images" else 24
        monkeypatch.setitem(HOSTS, name, replace(host, config=config, steps=3, batch=4, length=length))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def _narrow(full, changes, kind):
    follows = {
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "time_step_rank",
    }  # from what is changed
    follows |= {"layer_types", "stage_names", "out_features", "out_indices"}
    return lambda: kind(**({key: value for key, value in full.items() if key not in follows} | changes))


@pytest.mark.parametrize("name", HOSTS)
def test_every_host_can_be_pretrained_and_loaded(name):
    folder = pretrain(name, progress=False)
    report = json.loads((folder / "metrics.json").read_text())
    assert report["steps"] == 3
    assert report["after"]["loss"] > 0
    task = TASK[HOSTS[name].objective]
    model, preprocessor = load_base(name, task=task, labels=3 if task == "image-classification" else None)
    assert report["parameters"] > 0
    if task == "image-classification":
        rows = embedded.digits("test", classes=(5, 6, 7)).head(4)
        fitted = make_task(task, {"labels": ["5", "6", "7"]})
        batch = fitted.collator(preprocessor)([fitted.encode(rows, preprocessor)[n] for n in range(4)])
        assert model(**batch).logits.shape == (4, 3)
    else:
        batch = preprocessor(["the list\n  of"], return_tensors="pt")
        assert preprocessor.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["the list\n  of"]
        assert torch.isfinite(model(**batch, labels=batch["input_ids"]).loss)
        assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape[0] == 1


@pytest.mark.slow
def test_real_sizes_are_small_but_not_toys(monkeypatch):
    monkeypatch.undo()
    for name, host in HOSTS.items():
        with torch.device("meta"):
            model = getattr(transformers, host.model_class).from_config(host.config())
        assert 2e6 < sum(p.numel() for p in model.parameters()) < 4e6, name


def test_loss_falls_below_the_unigram_baseline(monkeypatch):
    monkeypatch.setitem(HOSTS, "tiny-gpt2", replace(HOSTS["tiny-gpt2"], rate=0.02))
    folder = pretrain("tiny-gpt2", steps=120, progress=False)
    report = json.loads((folder / "metrics.json").read_text())
    assert report["after"]["loss"] < 0.8 * report["baseline_loss"] < report["before"]["loss"]


def test_same_seed_same_weights_and_the_global_generator_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = (pretrain("tiny-gpt2", progress=False) / "model.safetensors").read_bytes()
    assert torch.equal(torch.rand(3), expected)
    again = (pretrain("tiny-gpt2", progress=False, force=True) / "model.safetensors").read_bytes()
    other = (pretrain("tiny-gpt2", progress=False, seed=1) / "model.safetensors").read_bytes()
    assert first == again != other


def test_a_host_that_is_there_is_not_made_again(monkeypatch):
    folder = pretrain("tiny-gpt2", progress=False)
    monkeypatch.setattr(pretraining, "lessons", lambda host: pytest.fail("was made again"))
    assert pretrain("tiny-gpt2", progress=False) == folder == host_folder("tiny-gpt2")


def test_a_failure_leaves_no_folder_and_keeps_the_old_one(small_world):
    def fail(path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), pretraining._new_folder(small_world / "hosts/x") as draft:
        fail(draft / "model.safetensors")
    assert not list((small_world / "hosts").iterdir())
    folder = pretrain("tiny-gpt2", progress=False)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(OSError, match="disk full"), pretraining._new_folder(folder) as draft:
        fail(draft / "model.safetensors")
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_other_versions_mean_another_host(monkeypatch):
    before = host_folder("tiny-gpt2")
    monkeypatch.setattr(pretraining, "_versions", lambda: {"torch": "9.9"})
    assert host_folder("tiny-gpt2") != before


def test_bad_names_and_steps():
    with pytest.raises(UnknownName, match="Did you mean tiny-gpt2"):
        pretrain("tiny-gtp2")
    with pytest.raises(BadOption, match="steps=0"):
        pretrain("tiny-gpt2", steps=0)


def test_tokenizer_knows_every_character_and_survives_the_disk(tmp_path):
    texts = ["héllo \x00 wörld\u2028 𝕏 <eos>", "  two  spaces\n"]
    for sentinels in (False, True):
        made = train_tokenizer(TEXTS, sentinels=sentinels, size=300)
        made.save_pretrained(tmp_path)
        for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
            plain = tokenizer(texts[1], add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(plain) == texts[1]
            ids = tokenizer(texts[0].removesuffix("<eos>"))["input_ids"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == texts[0].removesuffix("<eos>")
            assert (ids[-1] == tokenizer.eos_token_id) is sentinels
            assert len(tokenizer) == len(made) == 294 + 32 * sentinels  # all pairs of these texts are merged


def test_unigram_loss_by_hand():
    # frequencies with one added: a 3/6, b 2/6, c 1/6
    from math import log

    expected = -(log(3 / 6) + log(1 / 6)) / 2
    assert lessons.unigram_loss([0, 0, 1], [0, 2]) == pytest.approx(expected)
