"""Pains of files: complete or refused, no larger than what was trained, readable later."""

from __future__ import annotations

import json
import logging
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import graftwork as gw
from graftwork.adapters.documents import dump
from graftwork.adapters.format import DIGEST, KEY, _digest, read_own, write_own
from graftwork.adapters.manifest import Owner
from graftwork.adapters.stored import StoredAdapter
from graftwork.anatomy import resolve
from graftwork.errors import BadFile
from graftwork.testing import tiny, tiny_batch

from .kit import base_state, batch, grafted, llama, logits, same

ATTENTION = ["attention.query", "attention.value"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = llama()
    grafted(model, gw.LoRA(rank=2, workspaces=ATTENTION), "fr")
    return gw.save(model, tmp_path, "fr")


def rewritten(path: Path, renames: dict[str, str | None], added: tuple[str, ...] = ()) -> None:
    """Change the tensors of a whole, well-formed file: renamed (None: left out) or added."""
    stored = read_own(path)
    names = {name: renames.get(name, name) for name in stored.tensors}
    tensors = {new: stored.tensors[old] for old, new in names.items() if new is not None}
    owners = {
        new: _renamed(stored.manifest.tensors[old], old, new) for old, new in names.items() if new is not None
    }
    for name in added:
        tensors[name] = torch.ones(2, 2)
        owners[name] = Owner(0, name.rpartition(".")[0], name.rpartition(".")[2])
    write_own(path, StoredAdapter(replace(stored.manifest, tensors=owners), tensors))


def _renamed(owner: Owner, old: str, new: str) -> Owner:
    return owner if old == new else Owner(owner.technique, new.rpartition(".")[0], owner.name)


FIRST = "0/attention.query.down"


@pytest.mark.parametrize(
    ("renames", "added", "said"),
    [
        ({}, ("0/attention.output.down",), "too many.*0/attention.output"),
        ({FIRST: None}, (), "missing.*0/attention.query.down"),
        ({FIRST: "0/self_attention.query.down"}, (), "missing.*query.*too many.*self_attention"),
    ],
    ids=["surplus", "missing", "renamed"],
)
def test_pain_03_tensors_that_do_not_fit_are_refused_in_both_directions(saved, renames, added, said) -> None:
    rewritten(saved, renames, added)
    model = llama()
    before = logits(model, batch())
    with pytest.raises(BadFile, match=said):
        gw.load(model, saved)
    assert not gw.adapters(model)
    assert torch.equal(logits(model, batch()), before)


def test_pain_03_a_file_whose_every_tensor_is_renamed_is_refused(saved: Path) -> None:
    rewritten(saved, {name: f"base.{name}" for name in read_own(saved).tensors})
    with pytest.raises(BadFile):
        gw.load(llama(), saved)


@pytest.fixture
def from_peft(tmp_path: Path) -> Path:
    """A folder that HF PEFT itself wrote, of an adapter that does something."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


@pytest.mark.parametrize("change", ["surplus", "renamed", "missing"])
def test_pain_03_a_foreign_file_that_does_not_fit_is_refused_too(from_peft: Path, change: str) -> None:
    path = from_peft / "adapter_model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    if change == "surplus":
        tensors[first.replace("layers.0", "layers.7")] = tensors[first].clone()
    else:
        moved = tensors.pop(first)
        tensors |= {first.replace("self_attn", "attn"): moved} if change == "renamed" else {}
    save_file(tensors, path)
    with pytest.raises(BadFile):
        gw.load(llama(), from_peft)


def test_pain_06_the_file_holds_what_trains_and_says_what_each_part_weighs(tmp_path: Path) -> None:
    """Adapting both ends of the vocabulary writes neither frozen matrix."""
    model = llama()
    adapter = grafted(model, gw.LoRA(rank=2, workspaces=["embedding", "lm_head"]))
    path = gw.save(model, tmp_path)
    tensors = load_file(path)
    assert {tuple(t.shape) for t in tensors.values()} == {(2, 99), (32, 2), (2, 32), (99, 2)}
    assert sum(t.numel() for t in tensors.values()) == adapter.count() == 2 * 2 * (99 + 32)
    row = next(line.split() for line in adapter.summary().splitlines() if "lm_head" in line)
    assert row[-2:] == [f"{4 * 2 * (99 + 32):,}", "B"]


def test_pain_06_a_resized_vocabulary_does_not_enter_the_file(tmp_path: Path) -> None:
    model = llama()
    model.resize_token_embeddings(128)
    adapter = grafted(model, gw.LoRA(rank=2))
    tensors = load_file(gw.save(model, tmp_path))
    assert sum(t.numel() for t in tensors.values()) == adapter.count()
    assert not any(128 in t.shape for t in tensors.values())


def test_pain_06_saving_and_loading_use_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = llama()
    model.config._name_or_path = model.name_or_path = "somebody/a-model-on-a-hub"
    grafted(model, gw.LoRA(rank=2, workspaces=["embedding"]))
    gw.load(llama(), gw.save(model, tmp_path))
    gw.save(model, tmp_path / "other", format="hf-peft")


def test_pain_11_an_empty_tensor_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    """What a partitioned parameter looks like outside a gather."""
    model = llama()
    adapter = grafted(model, gw.LoRA(rank=2), "fr")
    next(iter(adapter.parameters())).data = torch.empty(0)
    with pytest.raises(BadFile, match=r"no elements.*gathered"):
        gw.save(model, tmp_path, "fr")
    assert not list(tmp_path.iterdir())


def test_pain_11_copies_of_a_head_are_registered_parameters_of_the_model() -> None:
    """A copy made while wrapping that the model does not know is missed by everything that partitions it."""
    model = tiny("bert-classification")
    adapter = gw.attach(model, gw.LoRA(rank=2))
    known = {id(p) for p in model.parameters()}
    assert any(site.workspace == "head" for site in adapter.sites.values())
    assert all(id(p) in known for p in adapter.parameters())


def changed_option(path: Path, **options: object) -> None:
    """Add options to the technique in a file, as a later version would write them, with a valid digest."""
    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()[KEY])
    document["techniques"][0]["options"] |= options
    tensors, text = load_file(path), dump(document)
    save_file(tensors, path, metadata={KEY: text, DIGEST: _digest(text, tensors)})


@pytest.mark.parametrize("value", [None, False, "", []])
def test_pain_22_a_later_option_that_asks_for_nothing_is_passed_over(saved: Path, value: object) -> None:
    changed_option(saved, rotation=value)
    model, plain = llama(), llama()
    gw.load(model, saved)
    grafted(plain, gw.LoRA(rank=2, workspaces=ATTENTION))
    assert gw.adapters(model)["fr"].techniques == gw.adapters(plain)["default"].techniques


@pytest.mark.parametrize("value", [True, 0.5, "qr", [1]])
def test_pain_22_a_later_option_that_asks_for_something_is_refused(saved: Path, value: object) -> None:
    changed_option(saved, rotation=value)
    with pytest.raises(BadFile, match="rotation"):
        gw.load(llama(), saved)


def test_pain_22_only_what_differs_from_the_defaults_is_written(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        document = json.loads(file.metadata()[KEY])
    assert document["techniques"][0]["options"] == {"rank": 2, "workspaces": ATTENTION}
    assert isinstance(document["format"], int)


@pytest.mark.parametrize(("value", "fits"), [(None, True), (False, True), ("something", False)])
def test_pain_22_unknown_fields_of_the_foreign_format_likewise(
    from_peft: Path, value: object, fits: bool
) -> None:
    path = from_peft / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rotation": value}))
    if fits:
        gw.load(llama(), from_peft)
    else:
        with pytest.raises(BadFile, match="use_rotation"):
            gw.load(llama(), from_peft)


@pytest.mark.parametrize("name", ["a", "ab", "b", "a_b", "default", "def"])
def test_pain_next_a_name_inside_another_saves_only_its_own(name: str, tmp_path: Path) -> None:
    model = llama()
    for seed, each in enumerate(("a", "ab", "b", "a_b", "default", "def")):
        grafted(model, gw.LoRA(rank=2), each, seed)
    gw.save(model, tmp_path, name)
    with gw.active(model, name):
        wanted = logits(model, batch())
    path = tmp_path / f"{name}.safetensors"
    assert sorted(tmp_path.iterdir()) == [path]
    assert load_file(path).keys() == gw.adapters(model)[name].tensors().keys()
    fresh = llama()
    gw.load(fresh, path)
    assert torch.equal(logits(fresh, batch()), wanted)


def test_pain_next_a_module_renamed_in_the_library_leaves_old_files_loadable(saved, monkeypatch) -> None:
    """Tensors are named by layer and workspace: when a library renames, its anatomy changes, no file."""
    assert not any("proj" in name or "layers" in name for name in load_file(saved))
    old, renamed = llama(), llama()
    gw.load(old, saved)
    wanted = logits(old, batch())
    new = {"q_proj": "to_query", "v_proj": "to_value"}
    kind = type(renamed.model.layers[0].self_attn)
    for layer in renamed.model.layers:
        layer.self_attn._modules = {
            new.get(name, name): child for name, child in layer.self_attn._modules.items()
        }
    for before, after in new.items():
        setattr(kind, before, property(lambda self, name=after: self._modules[name]))
    try:
        monkeypatch.setattr(resolve, "known_anatomy", _with_new_names(resolve.known_anatomy))
        gw.load(renamed, saved)
        assert set(gw.adapters(renamed)["fr"].sites) == {
            f"{n}/attention.{w}" for n in "01" for w in ("query", "value")
        }
        assert torch.equal(logits(renamed, batch()), wanted)
    finally:
        del kind.q_proj, kind.v_proj


def _with_new_names(known):
    paths = {"self_attn.q_proj": "self_attn.to_query", "self_attn.v_proj": "self_attn.to_value"}

    def renamed(found):
        anatomy = known(found)
        stacks = tuple(
            replace(s, places={k: paths.get(p, p) if isinstance(p, str) else p for k, p in s.places.items()})
            for s in anatomy.stacks
        )
        return replace(anatomy, stacks=stacks)

    return renamed


def test_pain_next_tensors_common_to_all_layers_are_written_once(tmp_path: Path) -> None:
    model = llama()
    adapter = grafted(model, gw.Compacter(order=4))
    assert len(adapter.placed) == 4
    tensors = load_file(gw.save(model, tmp_path))
    assert [name for name in tensors if "rule" in name] == ["shared.rule"]
    assert sum(t.numel() for t in tensors.values()) == adapter.count()


def test_pain_next_what_peft_readers_get_is_plain(tmp_path: Path) -> None:
    """The keys that HF PEFT itself writes, nothing saved whole, no option beyond them: what servers load."""
    peft = pytest.importorskip("peft")
    model = llama()
    grafted(model, gw.LoRA(rank=2, workspaces=ATTENTION))
    folder = gw.save(model, tmp_path / "ours", format="hf-peft")
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_file(folder / "adapter_model.safetensors")
    assert ours.keys() == load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("modules_to_save")
    assert not config.get("use_dora")


def test_pain_next_no_file_is_a_pickle(tmp_path: Path) -> None:
    """Prefix tuning, whose tensors another library could not write as safetensors, is written as such."""
    model = tiny("t5")
    grafted(model, gw.PrefixTuning(length=3, hidden=None))
    wanted = logits(model, tiny_batch("t5"))
    path = gw.save(model, tmp_path)
    assert load_file(path)
    fresh = tiny("t5")
    gw.load(fresh, path)
    assert torch.equal(logits(fresh, tiny_batch("t5")), wanted)
    assert same(base_state(fresh), base_state(tiny("t5")))


def test_pain_03_saving_the_base_says_that_adapters_stay_behind(tmp_path: Path, caplog) -> None:
    model = llama()
    grafted(model, gw.LoRA(rank=2), "fr")
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
    assert "without its adapters (fr)" in caplog.text
