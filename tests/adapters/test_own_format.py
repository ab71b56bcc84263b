"""graftwork's file: complete and unchanged, or a BadFile that says why. Nothing is run or partly read."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftwork.adapters.base import BaseIdentity, Sample
from graftwork.adapters.container import check_values, read_tensors, writable
from graftwork.adapters.documents import dump
from graftwork.adapters.format import DIGEST, KEY, _digest, read_card, read_own, write_own
from graftwork.adapters.manifest import Manifest, Owner, Place
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import BadFile
from graftwork.techniques.lora import LoRA

MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BASE = BaseIdentity(
    "LlamaForCausalLM",
    "llama",
    {"num_attention_heads": 4},
    {"8x8": 2},
    (Sample((8, 8), "float32", (0.5, -1.25)),),
)


def stored(name: str = "fr") -> StoredAdapter:
    torch.manual_seed(0)
    keys = ["0/attention.query", "1/attention.query"]
    tensors: dict[str, Tensor] = {}
    for key in keys:
        tensors |= {
            f"{key}.down": torch.randn(2, 8),
            f"{key}.up": torch.randn(8, 2, dtype=torch.float64).bfloat16(),
        }
    owners = {f"{key}.{part}": Owner(0, key, part) for key in keys for part in ("down", "up")}
    places = {
        key: Place(f"model.layers.{i}.self_attn.q_proj", "Linear", "weight", "output", "linear", layer=i)
        for i, key in enumerate(keys)
    }
    technique = LoRA(rank=2, alpha=3.5, workspaces=("attention.query",), layers=(0, 1))
    return StoredAdapter(
        Manifest(name, (technique,), places, owners, BASE, "SequenceClassification", {0: "no", 1: "yes"}),
        tensors,
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "fr.safetensors"
    write_own(path, stored())
    return path


def test_what_was_written_is_read(original: Path) -> None:
    read, wrote = read_own(original), stored()
    assert read.manifest == replace(wrote.manifest, written_by=read.manifest.written_by)
    assert read_card(original) == read.manifest
    assert read.tensors.keys() == wrote.tensors.keys()
    assert all(
        torch.equal(read.tensors[n], t) and read.tensors[n].dtype == t.dtype for n, t in wrote.tensors.items()
    )


def test_the_independent_reader_agrees_and_files_are_reproducible(original: Path, tmp_path: Path) -> None:
    theirs = load_file(original)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in stored().tensors.items())
    write_own(tmp_path / "again.safetensors", stored())
    assert (tmp_path / "again.safetensors").read_bytes() == original.read_bytes()


def test_pain_22_only_options_that_differ_are_written(original: Path) -> None:
    document = _document(original)
    assert document["techniques"][0]["options"] == {
        "rank": 2,
        "alpha": 3.5,
        "workspaces": ["attention.query"],
        "layers": [0, 1],
    }


@MANY
@given(content=st.binary(max_size=400))
def test_random_bytes(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadFile):
        read_own(path)


@MANY
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncation_anywhere(share: float, original: Path, tmp_path: Path) -> None:
    whole = original.read_bytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BadFile):
        read_own(path)


@pytest.mark.parametrize("edge", ["length", "header", "data"])
def test_truncation_at_the_edges(edge: str, original: Path, tmp_path: Path) -> None:
    whole = original.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    cut = {"length": 8, "header": 8 + length, "data": len(whole) - 1}[edge]
    (tmp_path / "x.safetensors").write_bytes(whole[:cut])
    with pytest.raises(BadFile):
        read_own(tmp_path / "x.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_noticed_or_harmless(
    share: float, bit: int, original: Path, tmp_path: Path
) -> None:
    content = bytearray(original.read_bytes())
    content[int(share * len(content))] ^= 1 << bit
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    try:
        read = read_own(path)
    except BadFile:
        return
    truth = read_own(original)
    assert read.manifest == truth.manifest
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in truth.tensors.items())


def test_surplus_bytes_are_refused(original: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(original.read_bytes() + b"\0" * 8)
    with pytest.raises(BadFile, match="corrupt"):
        read_own(tmp_path / "x.safetensors")


def test_header_size_bomb(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 40 * 2**20))
        file.truncate(41 * 2**20)
    with pytest.raises(BadFile, match="header"):
        read_own(path)
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(BadFile, match="cut off or no safetensors"):
        read_own(path)


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5, "torch", "torch-legacy"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_pickles_are_refused_by_content_and_never_run(
    protocol: int | str, suffix: str, tmp_path: Path
) -> None:
    path, trace = tmp_path / f"fr{suffix}", tmp_path / "trace"
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(Bomb(trace), protocol))
    else:
        torch.save(Bomb(trace), path, _use_new_zipfile_serialization=protocol == "torch")
    with pytest.raises(BadFile) as refused:
        read_own(path)
    if protocol not in (0, 1):
        assert "weights_only=True" in str(refused.value)
    assert not trace.exists()
    assert pickle.loads(pickle.dumps(Bomb(trace))) is None  # the bomb is real
    assert trace.exists()


@pytest.mark.parametrize("high", range(1, 6))
def test_headers_whose_length_looks_like_a_pickle_are_read(high: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    wanted = struct.pack("<Q", 0x80 + 256 * high)
    for padding in range(256 * high - 0x80, 256 * high + 0x80):
        save_file({"a": torch.ones(1)}, path, {"x": "x" * padding})
        if path.read_bytes()[:8] == wanted:
            break
    assert path.read_bytes()[:8] == wanted
    assert read_tensors(path).keys() == {"a"}


def _document(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KEY])


def _forge(path: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], None], source: Path) -> Path:
    """A file with an edited manifest and a digest that fits it, as someone hostile would write it."""
    document, tensors = _document(source), load_file(source)
    edit(document, tensors)
    text = dump(document)
    save_file(tensors, path, {KEY: text, DIGEST: _digest(text, tensors)})
    return path


def _set(*keys: Any, to: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def edit(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        inner: Any = document
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to

    return edit


DOWN = "0/attention.query.down"
FORGERIES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], object], str]] = {
    "later format": (_set("format", to=2), "format 2.*[Uu]pgrade"),
    "technique unknown": (_set("techniques", 0, "name", to="telepathy"), "telepathy"),
    "option unknown": (_set("techniques", 0, "options", "momentum", to=0.5), "momentum"),
    "option out of range": (_set("techniques", 0, "options", "rank", to=-1), "rank"),
    "option of the wrong kind": (_set("techniques", 0, "options", "rank", to=[1]), "rank"),
    "card differs": (_set("techniques", 0, "card", "insertion", to="sequential"), "insertion was sequential"),
    "scale differs": (_set("techniques", 0, "card", "scale", to=9.0), "scale was 9.0"),
    "owner out of range": (_set("tensors", DOWN, to=[1, "0/attention.query", "down"]), "technique 1 of 1"),
    "owner malformed": (_set("tensors", DOWN, to="mine"), "not \\[technique, site, name\\]"),
    "techniques no list": (_set("techniques", to={}), "'techniques' is a dict"),
    "base missing": (lambda d, t: d.pop("base"), "'base' is missing"),
    "labels numbers": (_set("labels", to={"x": "no"}), "label"),
    "sample unreadable": (_set("base", "samples", 0, "values", to="zz"), "unreadable"),
    "site no object": (_set("sites", "0/attention.query", to=3), "site"),
    "tensor missing": (lambda d, t: t.pop(DOWN), f"missing: {DOWN}"),
    "tensor too many": (lambda d, t: t.update({"9/spy": torch.ones(1)}), "too many: 9/spy"),
    "tensor renamed": (lambda d, t: t.update({"moved": t.pop(DOWN)}), f"missing: {DOWN}; too many: moved"),
    "NaN": (lambda d, t: t.update({DOWN: torch.full((2, 8), torch.nan)}), "NaN"),
    "no elements": (lambda d, t: t.update({DOWN: torch.ones(0, 8)}), "no elements"),
    "odd type": (lambda d, t: t.update({DOWN: torch.ones(2, 8, dtype=torch.complex64)}), "complex64"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_forged_files(case: str, original: Path, tmp_path: Path) -> None:
    edit, text = FORGERIES[case]
    path = _forge(tmp_path / "x.safetensors", edit, original)
    with pytest.raises(BadFile, match=text) as refused:
        read_own(path)
    assert str(path) in str(refused.value)


def test_an_unknown_option_that_asks_for_nothing_is_ignored(original: Path, tmp_path: Path) -> None:
    path = _forge(tmp_path / "x.safetensors", _set("techniques", 0, "options", "momentum", to=None), original)
    assert read_own(path).manifest.techniques == stored().manifest.techniques


def test_an_edit_without_a_new_digest_is_noticed(original: Path, tmp_path: Path) -> None:
    text = dump(_document(original) | {"task": "CausalLM"})
    save_file(load_file(original), tmp_path / "x.safetensors", {KEY: text, DIGEST: "0" * 64})
    with pytest.raises(BadFile, match="digest"):
        read_own(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply|not valid JSON"),
        ('{"format": NaN}', "NaN"),
        ('{"format": 1, "format": 1}', "twice"),
        ('{"format": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"format": true}', "is a bool"),
        ("\ud800", None),
        (" " * (16 * 2**20 + 1), "more than"),
    ],
)
def test_hostile_json(text: str, said: str | None, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if said is None:
        with pytest.raises(UnicodeEncodeError):
            save_file({"a": torch.ones(1)}, path, {KEY: text})
        return
    save_file({"a": torch.ones(1)}, path, {KEY: text, DIGEST: _digest(text, {"a": torch.ones(1)})})
    with pytest.raises(BadFile, match=said):
        read_own(path)


def test_other_safetensors_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    save_file({"base_model.model.q.lora_A.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(BadFile, match="HF PEFT"):
        read_own(tmp_path / "a.safetensors")
    save_file({"model.q.weight": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(BadFile, match="model weights"):
        read_card(tmp_path / "b.safetensors")


def test_folders_pipes_and_nothing_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none", tmp_path / "x\0y"):
        with pytest.raises(BadFile):
            read_own(path)


def test_a_failed_save_keeps_the_old_file(original: Path, tmp_path: Path) -> None:
    path = tmp_path / "fr.safetensors"
    path.write_bytes(original.read_bytes())
    broken = stored()
    for tensors in ({}, {DOWN: torch.ones(2, 8)}, {**broken.tensors, "spy": torch.ones(1)}):
        with pytest.raises(BadFile):
            write_own(path, StoredAdapter(broken.manifest, tensors))
    assert path.read_bytes() == original.read_bytes()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(0, 3), "no elements"),
        (torch.tensor([1.0, torch.inf]), "infinity"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
    ],
)
def test_pain_11_tensors_that_cannot_be_an_adapters_are_not_written(tensor: Tensor, said: str) -> None:
    with pytest.raises(BadFile, match=said):
        writable(tensor, "0/attention.query.down")


def test_views_and_transposed_tensors_are_written_whole(tmp_path: Path) -> None:
    adapter = stored()
    tensors = {
        n: writable(torch.randn(t.shape[1], 2 * t.shape[0])[:, ::2].T, n) for n, t in adapter.tensors.items()
    }
    write_own(tmp_path / "fr.safetensors", StoredAdapter(adapter.manifest, tensors))
    read = read_own(tmp_path / "fr.safetensors").tensors
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    check_values(next(iter(read.values())), "x")
