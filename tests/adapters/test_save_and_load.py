"""`save` and `load` on models: what was saved comes back, and nothing changes when anything is wrong."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from peft_hosts import batch, gap, host, logits, made_by_peft, randomised
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from graftwork.adapters.base import differences
from graftwork.adapters.format import DIGEST, KEY, _digest, read_card
from graftwork.adapters.installing import base_of
from graftwork.adapters.store import load, save
from graftwork.engine.attach import attach, detach
from graftwork.engine.merging import merge, unmerge
from graftwork.engine.verbs import active, adapters, trainable
from graftwork.errors import BadFile, BadOption, StateError, UnknownName, WrongBase
from graftwork.reference.catalogue import techniques
from graftwork.techniques.bitfit import BitFit
from graftwork.techniques.bottleneck_adapter import BottleneckAdapter
from graftwork.techniques.compacter import Compacter
from graftwork.techniques.fine_tuning import FineTuning
from graftwork.techniques.lora import LoRA
from graftwork.techniques.p_tuning import PTuning
from graftwork.techniques.prefix_tuning import PrefixTuning


def trained(name: str, *parts: object, called: str = "fr") -> PreTrainedModel:
    model = host(name)
    attach(model, parts, name=called)  # type: ignore[arg-type]
    randomised(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("technique", sorted(techniques()))
@pytest.mark.parametrize("name", ["llama", "bert-classifier"])
def test_every_technique_comes_back(technique: str, name: str, tmp_path: Path) -> None:
    kind = techniques()[technique]
    model = host(name)
    try:
        attach(model, kind(), name="fr")
    except Exception as error:  # a host that cannot have it (a bias-free one, BitFit)
        pytest.skip(str(error)[:80])
    randomised(model, 0.05)
    wanted = logits(model, name)
    path = save(model, tmp_path)
    assert path == tmp_path / "fr.safetensors"
    again = host(name)
    adapter = load(again, path)
    assert gap(wanted, logits(again, name)) < 1e-6
    assert adapter.name == "fr"
    assert read_card(path).techniques == tuple(t.stored() for t in adapters(model)["fr"].techniques)
    save(again, tmp_path / "again")
    assert (tmp_path / "again" / "fr.safetensors").read_bytes() == path.read_bytes()


def test_two_techniques_at_one_site_and_shared_tensors_come_back(tmp_path: Path) -> None:
    model = trained(
        "bert-classifier", LoRA(rank=2), LoRA(rank=3), BitFit(), Compacter(), BottleneckAdapter(), Compacter()
    )
    wanted = logits(model, "bert-classifier")
    save(model, tmp_path)
    again = host("bert-classifier")
    load(again, tmp_path)
    assert gap(wanted, logits(again, "bert-classifier")) < 1e-6
    names = read_card(tmp_path / "fr.safetensors").tensors
    assert {
        "0/attention.query.down",
        "lora@0/attention.query.down",
        "bitfit@0/attention.query.delta",
    } <= names.keys()


@pytest.mark.parametrize("scaffold", [PTuning(length=3, hidden=8), PrefixTuning(length=3, hidden=8)])
def test_scaffolding_is_not_saved_and_shared_names_do_not_stay(scaffold: object, tmp_path: Path) -> None:
    model = trained("llama", scaffold)
    wanted = logits(model, "llama")
    path = save(model, tmp_path)
    values = sum(tensor.numel() for tensor in load_file(path).values())
    assert values < adapters(model)["fr"].count()
    again = host("llama")
    load(again, path)
    assert gap(wanted, logits(again, "llama")) < 1e-6


def test_the_head_travels_with_its_adapter_and_its_labels(tmp_path: Path) -> None:
    model = trained("bert-classifier", LoRA(rank=2))
    model.config.id2label = {0: "no", 1: "perhaps", 2: "yes"}
    card = read_card(save(model, tmp_path))
    assert card.labels == {0: "no", 1: "perhaps", 2: "yes"}
    assert card.task == "SequenceClassification"
    assert {"head.weight", "head.bias"} <= card.tensors.keys()
    fresh = host("bert-classifier")
    nn.init.normal_(fresh.classifier.weight)  # every fresh head differs: it is no part of the base
    load(fresh, tmp_path)
    assert gap(logits(model, "bert-classifier"), logits(fresh, "bert-classifier")) < 1e-6


def test_pain_7_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = trained("gpt2", FineTuning(workspaces=("embedding", "lm_head")))
    wanted = logits(model, "gpt2")
    path = save(model, tmp_path)
    assert sum(tensor.numel() for tensor in load_file(path).values()) == 40 * 16
    again = host("gpt2")
    load(again, path)
    assert gap(wanted, logits(again, "gpt2")) < 1e-6


def test_pain_7_two_trained_ends_of_tied_weights_are_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["c_attn"],
        modules_to_save=["wte", "lm_head"],
        fan_in_fan_out=True,
    )
    made_by_peft("gpt2", config, tmp_path)
    with pytest.raises(BadFile, match="tied"):
        load(host("gpt2"), tmp_path)


def test_the_identity_of_the_base_does_not_feel_adapters(tmp_path: Path) -> None:
    bare = base_of(host("llama"))
    model = trained("llama", LoRA(rank=2), called="one")
    attach(model, BottleneckAdapter(), name="two")
    assert differences(bare, base_of(model)) == []
    active(model)
    assert base_of(model).fingerprint == bare.fingerprint
    detach(model)
    assert base_of(model) == bare


def test_saving_and_loading_while_merged_is_refused(tmp_path: Path) -> None:
    model = trained("llama", LoRA(rank=2))
    path = save(model, tmp_path)
    merge(model, "fr")
    with pytest.raises(StateError, match="unmerge before saving"):
        save(model, tmp_path)
    with pytest.raises(StateError, match="unmerge before loading"):
        load(model, path, name="again")
    unmerge(model)
    load(model, path, name="again")


def test_pain_20_loading_leaves_the_other_sets_alone(tmp_path: Path) -> None:
    path = save(trained("llama", LoRA(rank=2)), tmp_path)
    model = host("llama")
    attach(model, LoRA(rank=2), name="learns")
    attach(model, LoRA(rank=2), name="frozen")
    trainable(model, "learns")
    half = next(adapters(model)["learns"].parameters()).requires_grad_(False)
    load(model, path)
    assert [name for name, adapter in adapters(model).items() if adapter.trainable] == ["learns"]
    assert not half.requires_grad
    load(model, path, name="more", trainable=True)
    assert [name for name, adapter in adapters(model).items() if adapter.trainable] == ["learns", "more"]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Nothing of the model differs afterwards: values, keys, classes, what trains, what is active."""

    def seen() -> tuple[object, ...]:
        classes = [(path, type(module)) for path, module in model.named_modules()]
        training = [(path, p.requires_grad, id(p)) for path, p in model.named_parameters()]
        names = {name: id(adapter) for name, adapter in adapters(model).items()}
        extra = [(path, sorted(vars(module))) for path, module in model.named_modules()]
        return classes, training, names, extra

    values = {key: value.clone() for key, value in model.state_dict().items()}
    before, answer = seen(), model(**batch("llama")).logits
    yield
    assert seen() == before
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in values.items())
    assert torch.equal(answer, model(**batch("llama")).logits)


def forged(path: Path, edit: Callable[[dict, dict], object]) -> Path:
    """The file with an edit, and a digest that fits it."""
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()[KEY])
    tensors = load_file(path)
    edit(document, tensors)
    text = json.dumps(document)
    save_file(tensors, path, {KEY: text, DIGEST: _digest(text, tensors)})
    return path


DOWN = "0/attention.query.down"
BROKEN: dict[str, tuple[Callable[[dict, dict], object], type[Exception], str]] = {
    "shape": (lambda d, t: t.update({DOWN: torch.ones(3, 16)}), BadFile, r"\(3, 16\), expected \(2, 16\)"),
    "transposed": (lambda d, t: t.update({DOWN: torch.ones(16, 2)}), BadFile, DOWN),
    "integers": (lambda d, t: t.update({DOWN: torch.ones(2, 16, dtype=torch.int64)}), BadFile, "int64"),
    "missing": (lambda d, t: (t.pop(DOWN), d["tensors"].pop(DOWN)), BadFile, f"missing: {DOWN}"),
    "surplus": (
        lambda d, t: (t.update(spy=torch.ones(1)), d["tensors"].update(spy=[0, "0/attention.query", "spy"])),
        BadFile,
        r"too many: 0/attention.query.spy",
    ),
    "site unknown": (
        lambda d, t: d["tensors"].update({DOWN: [0, "7/attention.query", "down"]}),
        BadFile,
        "too many: 7/attention.query.down",
    ),
    "workspace unknown": (
        lambda d, t: d["techniques"][0]["options"].update(workspaces=["attention.nose"]),
        BadFile,
        "attention.nose",
    ),
    "name escapes": (lambda d, t: d.update(name="../../x"), BadOption, "file name"),
    "other base": (
        lambda d, t: d["base"].update(model_type="mistral"),
        WrongBase,
        "model type mistral, here llama",
    ),
    "other weights": (
        lambda d, t: [s.update(values="0000803f" * 8) for s in d["base"]["samples"]],
        WrongBase,
        "the weights themselves",
    ),
    "other vocabulary": (lambda d, t: d["base"]["shapes"].update({"41x16": 1}), WrongBase, "41x16"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("others", [False, True])
def test_loading_is_all_or_nothing(case: str, others: bool, tmp_path: Path) -> None:
    path = save(trained("llama", LoRA(rank=2)), tmp_path)
    edit, error, said = BROKEN[case]
    forged(path, edit)
    model = host("llama")
    if others:
        attach(model, BottleneckAdapter(), name="here")
        attach(model, LoRA(), name="there")
        active(model, "here", "there")
        trainable(model, "here")
        randomised(model)
    with unchanged(model), pytest.raises(error, match=said):
        load(model, path)


def test_another_base_can_be_asked_for(tmp_path: Path) -> None:
    path = save(trained("llama", LoRA(rank=2)), tmp_path)
    model = host("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.01)
    with unchanged(model), pytest.raises(WrongBase, match="allow_other_base=True"):
        load(model, path)
    load(model, path, allow_other_base=True)


def test_a_bf16_copy_is_the_same_base(tmp_path: Path) -> None:
    path = save(trained("llama", LoRA(rank=2)), tmp_path)
    load(host("llama").bfloat16(), path)


def test_one_backbone_under_another_head_is_the_same_base(tmp_path: Path) -> None:
    model = host("llama-classifier")
    attach(model, LoRA(rank=2), name="fr", head=False)
    path = save(model, tmp_path)
    causal = host("llama")
    causal.model.load_state_dict({k: v for k, v in model.model.state_dict().items() if "grafts" not in k})
    load(causal, path)


def test_names(tmp_path: Path) -> None:
    model = trained("llama", LoRA(rank=2))
    attach(model, LoRA(rank=2), name="law")
    with pytest.raises(UnknownName, match="fr, law"):
        save(model, tmp_path)
    with pytest.raises(BadOption, match="file name"):
        save(model, tmp_path, "../law")
    with pytest.raises(UnknownName, match="Did you mean law"):
        save(model, tmp_path, "lax")
    with pytest.raises(BadOption, match="Did you mean hf-peft"):
        save(model, tmp_path, "law", format="hf_peft")
    save(model, tmp_path, "fr")
    save(model, tmp_path, "law")
    save(model, tmp_path, "law", format="hf-peft")
    again = host("llama")
    with pytest.raises(BadFile, match="several adapters: fr, law, law"):
        load(again, tmp_path)
    assert load(again, tmp_path, name="fr").name == "fr"
    with pytest.raises(StateError, match="attached already"):
        load(again, tmp_path, name="fr")
    assert load(again, tmp_path / "fr.safetensors", name="autre").name == "autre"
    assert load(again, tmp_path / "law").name == "law"
    with pytest.raises(BadFile, match="does not exist"):
        load(again, tmp_path / "nothing")


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.trace,)


@pytest.mark.parametrize(
    "called", ["adapter_model.bin", "adapter_model.safetensors", "fr.safetensors", "fr.pt"]
)
def test_pickles_are_never_read(called: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"base_model.model.q.lora_A.weight": Bomb(trace)}, tmp_path / called)
    if called.startswith("adapter_model"):
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    model = host("llama")
    for path in (tmp_path, tmp_path / called):
        with unchanged(model), pytest.raises(BadFile):
            load(model, path)
    (tmp_path / "adapter_config.json").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(BadFile, match="pickle"):
        load(model, tmp_path)
    assert not trace.exists()


def test_pain_11_a_failed_save_keeps_what_was_on_disk(tmp_path: Path) -> None:
    model = trained("llama", LoRA(rank=2))
    paths = [save(model, tmp_path), save(model, tmp_path, format="hf-peft")]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    parameter = next(adapters(model)["fr"].parameters())
    parameter.data.view(-1)[0] = torch.nan
    for format in ("graftwork", "hf-peft"):
        with pytest.raises(BadFile, match=r"NaN.*diverged"):
            save(model, tmp_path, format=format)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert len(paths) == 2


@pytest.mark.distributed
def test_a_sharded_model_saves_the_same_bytes(tmp_path: Path) -> None:
    model = trained("llama", LoRA(rank=2))
    whole = save(model, tmp_path / "whole").read_bytes()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
        assert type(next(model.parameters())).__name__ == "DTensor"
        assert save(model, tmp_path / "sharded").read_bytes() == whole
    finally:
        dist.destroy_process_group()
