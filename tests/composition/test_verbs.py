"""The verbs on models and on files: what comes out, what stays, what is refused, and that nothing is half-done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graftwork as gw
from graftwork.adapters.format import read_own
from graftwork.composition import Concatenation, Linear
from graftwork.errors import BadFile, BadOption, NotComposable, StateError, UnknownName, WrongBase
from graftwork.laws import answer, stir
from graftwork.testing import tiny, tiny_batch

HOST = "llama"
LORA = gw.LoRA(rank=2, alpha=4)


def with_adapters(
    *names: str, technique: gw.Technique = LORA, host: str = HOST, head: bool = False
) -> nn.Module:
    """A model with stirred adapters of these names."""
    torch.manual_seed(0)
    model = tiny(host)
    for seed, name in enumerate(names):
        stir(gw.attach(model, technique, name=name, head="auto" if head else False), seed=seed)
    return model


def tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in gw.adapters(model)[name].tensors().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files a, b and c of the adapters of one model."""
    model = with_adapters("a", "b", "c")
    for name in "abc":
        gw.save(model, tmp_path, name=name)
    return tmp_path


def test_a_model_and_its_files_give_the_same_bits(folder: Path) -> None:
    model = with_adapters("a", "b", "c")
    gw.compose(model, "a + 0.5*b - c", name="sum")
    made = gw.compose(folder, "a + 0.5*b - c", name="sum")
    assert made.path == folder / "sum.safetensors"
    assert made.retained == 1.0
    read = read_own(made.path).tensors
    attached = tensors(model, "sum")
    assert all(torch.equal(read[key], tensor) for key, tensor in attached.items())
    fresh = tiny(HOST)
    gw.load(fresh, made.path)
    torch.testing.assert_close(answer(fresh, tiny_batch(HOST)), answer(model, tiny_batch(HOST)))


def test_verbs_are_weights() -> None:
    model = with_adapters("a", "b")
    gw.add(model, "a", "b", name="one")
    gw.combine(model, {"a": 1.0, "b": 1.0}, name="two")
    gw.negate(model, "a", name="three", strength=0.3)
    gw.scale(model, "a", -0.3, name="four")
    for first, second in (("one", "two"), ("three", "four")):
        assert all(torch.equal(t, tensors(model, second)[k]) for k, t in tensors(model, first).items())


def test_a_scaled_lora_changes_the_weights_so_much() -> None:
    model = with_adapters("a")
    gw.scale(model, "a", 0.25, name="quarter")
    one, quarter = (
        gw.adapters(model)[name].modules[0, "1/attention.value"].delta() for name in ("a", "quarter")
    )
    torch.testing.assert_close(quarter, 0.25 * one)


def test_the_new_adapter_is_active_and_frozen_and_the_others_stay() -> None:
    model = with_adapters("a", "b")
    before = {name: tensors(model, name) for name in "ab"}
    trained = [name for name in "ab" if gw.adapters(model)[name].trainable]
    made = gw.add(model, "a", "b", name="sum")
    assert made.adapter is gw.adapters(model)["sum"]
    assert not made.adapter.trainable
    assert [name for name in "ab" if gw.adapters(model)[name].trainable] == trained
    batch = tiny_batch(HOST)
    with gw.active(model, "sum"):
        wanted = answer(model, batch)
    assert torch.equal(answer(model, batch), wanted)
    for name in "ab":
        assert all(torch.equal(t, before[name][key]) for key, t in tensors(model, name).items())


def test_operand_files_stay(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    gw.compose(folder, "a - b", name="c2")
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_operands_are_found_by_name_path_and_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ways = [
        gw.add(folder, "a", "b", name="n1"),
        gw.add(out, folder / "a.safetensors", str(folder / "b.safetensors"), name="n2"),
        gw.compose(
            out, "x + y", name="n3", operands={"x": folder / "a.safetensors", "y": folder / "b.safetensors"}
        ),
        gw.compose(out, f"'{folder / 'a.safetensors'}' + '{folder / 'b.safetensors'}'", name="n4"),
    ]
    read = [read_own(way.path).tensors for way in ways if way.path]
    assert len(read) == 4
    assert all(torch.equal(other[key], tensor) for other in read[1:] for key, tensor in read[0].items())


def test_unknown_names_are_told_the_nearest(folder: Path) -> None:
    with pytest.raises(UnknownName, match="no adapter is called 'toxic'"):
        gw.compose(folder, "a - toxic", name="x")
    with pytest.raises(UnknownName, match="Did you mean french"):
        gw.compose(folder, "frensh", name="x", operands={"french": folder / "a.safetensors"})
    with pytest.raises(UnknownName, match=r"no adapter is called 'd'. Known: a, b\."):
        gw.add(with_adapters("a", "b"), "a", "d", name="x")
    assert not (folder / "x.safetensors").exists()


def test_the_result_never_replaces_an_operand(folder: Path) -> None:
    before = (folder / "a.safetensors").read_bytes()
    with pytest.raises(BadOption, match="is the operand 'a' itself"):
        gw.compose(folder, "a - b", name="a")
    assert (folder / "a.safetensors").read_bytes() == before
    model = with_adapters("a", "b")
    with pytest.raises(StateError, match="'a' is attached already"):
        gw.add(model, "a", "b", name="a")


def test_a_failed_write_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = gw.compose(folder, "a - b", name="sum").path
    assert made is not None
    before, entries = made.read_bytes(), sorted(folder.iterdir())

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("graftwork.adapters.format.write", full)
    with pytest.raises(OSError, match="no space"):
        gw.compose(folder, "a + b", name="sum")
    assert made.read_bytes() == before
    assert sorted(folder.iterdir()) == entries


def test_a_failed_sum_leaves_the_model_as_it_was() -> None:
    model = with_adapters("a")
    stir(gw.attach(model, gw.LoRA(rank=3), name="b", head=False))
    batch = tiny_batch(HOST)
    before = answer(model, batch)
    with pytest.raises(NotComposable, match=r"'a' and 'b' cannot be added .* rank is 2 and 3"):
        gw.add(model, "a", "b", name="sum")
    assert list(gw.adapters(model)) == ["a", "b"]
    assert torch.equal(answer(model, batch), before)
    gw.add(model, "a", "b", name="sum", method=Concatenation())  # the way out that the message names


@pytest.mark.parametrize(
    ("technique", "word"),
    [
        (gw.IA3(), "techniques lora and ia3"),
        (gw.LoRA(rank=2, alpha=8), r"scale is 2.0 and 4.0"),
        (gw.LoRA(rank=2, alpha=4, layers=(0,)), r"only 'a' has 1/attention.query, 1/attention.value"),
        (gw.LoRA(rank=2, alpha=4, workspaces=("attention.key",)), r"only 'b' has 0/attention.key"),
    ],
)
def test_differences_are_named(technique: gw.Technique, word: str) -> None:
    model = with_adapters("a")
    gw.attach(model, technique, name="b", head=False)
    with pytest.raises(NotComposable, match=word):
        gw.add(model, "a", "b", name="sum")


def test_options_of_training_may_differ() -> None:
    model = with_adapters("a")
    gw.attach(model, gw.LoRA(rank=2, alpha=4, dropout=0.1, up_rate=4.0), name="b", head=False)
    gw.add(model, "a", "b", name="sum")


def test_seeds_of_frozen_parts_must_agree() -> None:
    model = tiny(HOST)
    for seed, name in enumerate("ab"):
        gw.attach(model, gw.VeRA(rank=4, seed=seed), name=name, head=False)
    with pytest.raises(NotComposable, match="seed is 0 and 1"):
        gw.add(model, "a", "b", name="sum")
    gw.detach(model)
    for seed, name in enumerate("ab"):
        gw.attach(model, gw.S2FT(share=0.1, seed=seed), name=name, head=False)
    with pytest.raises(NotComposable, match="frozen and differs"):
        gw.add(model, "a", "b", name="sum")
    gw.add(model, "a", "b", name="sum", method=Linear(rank=4))


def test_other_bases_are_refused(folder: Path, tmp_path: Path) -> None:
    other = with_adapters("d", host="gpt2")
    gw.save(other, tmp_path, name="d")
    with pytest.raises(WrongBase, match="model type"):
        gw.add(folder, "a", tmp_path / "d.safetensors", name="sum")


def test_prompts_have_means_only() -> None:
    model = with_adapters("a", "b", technique=gw.PromptTuning(length=4))
    gw.combine(model, {"a": 0.25, "b": 0.75}, name="mean")
    parts = [next(iter(tensors(model, name).values())) for name in ("a", "b", "mean")]
    torch.testing.assert_close(parts[2], 0.25 * parts[0] + 0.75 * parts[1])
    for weights in ({"a": 1.0, "b": 1.0}, {"a": -1.0}, {"a": 1.5, "b": -0.5}):
        with pytest.raises(NotComposable, match=r"prompt-tuning .* only means are defined"):
            gw.combine(model, weights, name="sum")


def test_trained_copies_are_added_as_differences_from_the_host() -> None:
    """theta0 - w (theta - theta0), the full fine-tuning counterpart; a mean needs no base and works on files."""
    model = with_adapters("a", "b", technique=gw.FineTuning(workspaces=("attention.query",)))
    key, path = "0/attention.query", "model.layers.0.self_attn.q_proj"
    base = model.get_submodule(path)._parameters["weight"].detach()
    own = {name: gw.adapters(model)[name].modules[0, key].weight.detach() for name in "ab"}
    for name, weights, wanted in (
        ("minus", {"a": -0.7}, base - 0.7 * (own["a"] - base)),
        ("sum", {"a": 1.0, "b": 1.0}, own["a"] + own["b"] - base),
        ("mean", {"a": 0.5, "b": 0.5}, (own["a"] + own["b"]) / 2),
    ):
        made = gw.combine(model, weights, name=name).adapter
        assert made is not None
        torch.testing.assert_close(made.modules[0, key].weight, wanted, atol=1e-6, rtol=1e-6)


def test_files_of_trained_copies_have_means_and_say_what_else_needs(tmp_path: Path) -> None:
    model = with_adapters("a", "b", technique=gw.FineTuning(workspaces=("attention.query",)))
    for name in "ab":
        gw.save(model, tmp_path, name=name)
    gw.combine(tmp_path, {"a": 0.5, "b": 0.5}, name="mean")
    with pytest.raises(NotComposable, match=r"needs the base, and 'a' is a file: attach the adapters"):
        gw.negate(tmp_path, "a", name="minus")


def test_several_techniques_compose_each_in_its_way() -> None:
    model = tiny(HOST)
    stir(gw.attach(model, [LORA, gw.IA3(workspaces=("attention.key",))], name="a", head=False))
    made = gw.negate(model, "a", name="minus").adapter
    assert made is not None
    gain = [one.modules[1, "0/attention.key"].scale for one in (gw.adapters(model)["a"], made)]
    torch.testing.assert_close(gain[1], 2 - gain[0])
    with pytest.raises(NotComposable, match="2 techniques"):
        gw.negate(model, "a", name="x", method=Concatenation())


def labelled(labels: list[str], seed: int, folder: Path, name: str) -> None:
    """Save an adapter with a head for these labels."""
    model = tiny("bert-classification", {"num_labels": len(labels)})
    model.config.id2label = dict(enumerate(labels))
    stir(gw.attach(model, LORA, name=name), seed=seed)
    gw.save(model, folder, name=name)


def head_of(path: Path) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in read_own(path).tensors.items() if key.startswith("head")}


def test_heads_of_one_label_space_are_averaged(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        labelled(["no", "yes"], seed, tmp_path, name)
    for weights, share in (
        ({"a": 0.5, "b": 0.5}, 0.5),
        ({"a": 1.0, "b": 3.0}, 0.25),
        ({"a": 1.5, "b": -0.5}, 1.5),
    ):
        made = gw.combine(tmp_path, weights, name="mix").path
        assert made is not None
        a, b = head_of(tmp_path / "a.safetensors"), head_of(tmp_path / "b.safetensors")
        for key, tensor in head_of(made).items():
            torch.testing.assert_close(tensor, share * a[key] + (1 - share) * b[key])
        assert read_own(made).manifest.labels == {0: "no", 1: "yes"}
    with pytest.raises(NotComposable, match="add up to 0"):
        gw.compose(tmp_path, "a - b", name="x")


def test_heads_of_other_labels_are_said(tmp_path: Path) -> None:
    labelled(["no", "yes"], 0, tmp_path, "a")
    labelled(["bad", "good"], 1, tmp_path, "b")
    with pytest.raises(NotComposable, match=r"labels no, yes.* and 'b' \(labels bad, good\) do not share"):
        gw.add(tmp_path, "a", "b", name="x")
    assert not (tmp_path / "x.safetensors").exists()
    bare = gw.add(tmp_path, "a", "b", name="x", head="none").path
    kept = gw.add(tmp_path, "a", "b", name="y", head="b").path
    assert bare is not None
    assert kept is not None
    assert not head_of(bare)
    assert all(torch.equal(t, head_of(tmp_path / "b.safetensors")[k]) for k, t in head_of(kept).items())
    assert read_own(kept).manifest.labels == {0: "bad", 1: "good"}
    with pytest.raises(UnknownName, match="no adapter of the sum called 'z' has a task head"):
        gw.add(tmp_path, "a", "b", name="z", head="z")


def test_a_lone_adapter_keeps_its_head(tmp_path: Path) -> None:
    labelled(["no", "yes"], 0, tmp_path, "a")
    made = gw.negate(tmp_path, "a", name="minus").path
    assert made is not None
    assert all(torch.equal(t, head_of(tmp_path / "a.safetensors")[k]) for k, t in head_of(made).items())


def test_other_bad_input(folder: Path) -> None:
    with pytest.raises(BadOption, match="at least one adapter"):
        gw.add(folder, name="x")
    with pytest.raises(BadOption, match="not a finite number"):
        gw.scale(folder, "a", float("nan"), name="x")
    with pytest.raises(BadOption, match="cannot be a file name"):
        gw.scale(folder, "a", 2.0, name="../x")
    model = with_adapters("a")
    gw.save(model, folder / "theirs", name="a", format="hf-peft")
    with pytest.raises(BadFile, match="graftwork convert"):
        gw.scale(folder / "out", folder / "theirs", 2.0, name="x")
    gw.merge(model, "a")
    with pytest.raises(StateError, match="merged"):
        gw.scale(model, "a", 2.0, name="x")
