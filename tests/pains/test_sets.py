"""Pains of state: who is attached, active and trainable, in verbs, recomputation and processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import graftwork as gw
from graftwork.engine.attach import state_of
from graftwork.engine.recompute import enable_checkpointing
from graftwork.errors import BadFile
from graftwork.testing import tiny, tiny_batch

from .kit import batch, grafted, llama, logits, training


def state(model: nn.Module) -> tuple[list[str], tuple[str, ...], set[str]]:
    """(attached, active, trainable)."""
    return list(gw.adapters(model)), state_of(model).active, training(model)


def test_pain_20_the_trainable_set_after_every_verb(tmp_path) -> None:
    model = llama()
    gw.attach(model, gw.LoRA(rank=2), name="one")
    assert state(model) == (["one"], ("one",), {"one"})
    path = gw.save(model, tmp_path, "one")
    assert state(model) == (["one"], ("one",), {"one"})
    gw.attach(model, gw.IA3(), name="two")
    assert state(model) == (["one", "two"], ("two",), {"two"})
    gw.load(model, path, name="three")
    assert state(model) == (["one", "two", "three"], ("three",), {"two"})
    gw.active(model, "one")
    assert state(model) == (["one", "two", "three"], ("one",), {"two"})
    gw.trainable(model, "one", "three")
    assert state(model) == (["one", "two", "three"], ("one",), {"one", "three"})
    gw.merge(model, "one")
    assert state(model) == (["one", "two", "three"], (), {"one", "three"})
    gw.unmerge(model)
    assert state(model) == (["one", "two", "three"], ("one",), {"one", "three"})
    gw.route(model, ["one", "two"], torch.tensor([0, 1, -1]))
    assert state(model) == (["one", "two", "three"], ("one",), {"one", "three"})
    gw.route(model, None)
    gw.detach(model, "three")
    assert state(model) == (["one", "two"], ("one",), {"one"})
    gw.load(model, path, name="four", trainable=True)
    assert state(model) == (["one", "two", "four"], ("four",), {"one", "four"})
    assert state(copy.deepcopy(model)) == state(model)


@pytest.mark.parametrize("verb", ["active", "none active", "trainable", "none trainable", "route"])
@pytest.mark.parametrize("failing", [False, True])
def test_pain_20_leaving_a_block_restores_exactly_what_it_found(verb: str, failing: bool) -> None:
    model = llama()
    for name in ("one", "two"):
        gw.attach(model, gw.LoRA(rank=2), name=name)
    gw.active(model, "one", "two")
    gw.trainable(model, "one")
    frozen = next(iter(gw.adapters(model)["one"].parameters()))
    frozen.requires_grad_(False)  # by hand: a block must not thaw it
    found, flags = state(model), [p.requires_grad for p in model.parameters()]
    blocks = {
        "active": lambda: gw.active(model, "two"),
        "none active": lambda: gw.active(model),
        "trainable": lambda: gw.trainable(model, "two"),
        "none trainable": lambda: gw.trainable(model),
        "route": lambda: gw.route(model, ["two"], torch.tensor([0])),
    }
    try:
        with blocks[verb]():
            assert failing is False or 1 / 0
    except ZeroDivisionError:
        pass
    assert state(model) == found
    assert [p.requires_grad for p in model.parameters()] == flags


def gradients(model: nn.Module, adapter: gw.Adapter, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model(**inputs).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in adapter.named_parameters()}


CARRIED = {
    "prefix": gw.PrefixTuning(length=3, hidden=None),
    "prompt": gw.PromptTuning(length=3),
    "bottleneck": gw.BottleneckAdapter(width=4),
    "lora": gw.LoRA(rank=2),
}


def trained(host: str, technique: gw.Technique, reentrant: bool | None) -> dict[str, Tensor]:
    model, inputs = tiny(host).train(), tiny_batch(host)
    adapter = grafted(model, technique, seed=4, head=False)
    if reentrant is not None:
        enable_checkpointing(model, reentrant=reentrant)
        model.enable_input_require_grads()
    return gradients(model, adapter, inputs)


@pytest.mark.parametrize("host", ["llama", "mistral", "gemma3", "qwen3"])
def test_pain_23_prefixes_train_under_gradient_checkpointing(host: str) -> None:
    """Plain, sliding-window and per-layer attention: the same gradients as without, and none of them zero."""
    technique = gw.PrefixTuning(length=3, hidden=None)
    torch.manual_seed(0)
    wanted = trained(host, technique, None)
    for reentrant in (True, False):
        torch.manual_seed(0)
        found = trained(host, technique, reentrant)
        for name, gradient in wanted.items():
            assert gradient.abs().sum() > 0, name
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("host", ["llama", "mistral", "gemma2", "gemma3", "t5"])
def test_pain_23_prefixes_generate_with_a_cache_as_without(host: str) -> None:
    model, inputs = tiny(host), tiny_batch(host, length=9)
    inputs.pop("decoder_input_ids", None)
    bare = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    grafted(model, gw.PrefixTuning(length=3, hidden=None), seed=2).load_tensors(
        {name: 2 * torch.randn(t.shape) for name, t in gw.adapters(model)["default"].tensors().items()}
    )
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(**inputs, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    assert not torch.equal(cached, bare)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", CARRIED)
def test_pain_next_recomputation_is_given_the_route_of_its_forward(name: str, reentrant: bool) -> None:
    """The route has ended when backward recomputes: what ran in forward must run again."""
    found = {}
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model, inputs = llama().train(), tiny_batch("llama")
        adapter = grafted(model, CARRIED[name], "ann", seed=4)
        if checkpointed:
            enable_checkpointing(model, reentrant=reentrant)
            model.enable_input_require_grads()
        with gw.route(model, ["ann"], torch.tensor([0, -1, 0])):
            loss = model(**inputs).logits.square().mean()
        gw.active(model)
        loss.backward()
        found[checkpointed] = {key: p.grad for key, p in adapter.named_parameters()}
    for key, gradient in found[False].items():
        torch.testing.assert_close(found[True][key], gradient, rtol=1e-4, atol=1e-6)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of one, over memory: no port, no other process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_pain_10_fp32_adapters_on_a_bf16_base_are_sharded_and_train(one_process, tmp_path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    wanted = llama().to(torch.bfloat16)
    grafted(wanted, gw.LoRA(rank=2), "fr", seed=3)
    model = llama().to(torch.bfloat16)
    adapter = grafted(model, gw.LoRA(rank=2), "fr", seed=3)
    adapter.load_tensors(gw.adapters(wanted)["fr"].tensors())
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert all(hasattr(p, "full_tensor") for p in adapter.parameters())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    reference = torch.optim.SGD(gw.adapters(wanted)["fr"].parameters(), lr=0.5)
    for each, steps in ((model, optimizer), (wanted, reference)):
        each(**batch()).logits.float().square().mean().backward()
        steps.step()
    gw.load(fresh := llama().to(torch.bfloat16), gw.save(model, tmp_path, "fr"))
    for name, tensor in gw.adapters(wanted)["fr"].tensors().items():
        torch.testing.assert_close(gw.adapters(fresh)["fr"].tensors()[name], tensor, rtol=1e-5, atol=1e-6)


def test_pain_next_several_processes_average_what_trains_and_nothing_else(one_process) -> None:
    model = llama()
    adapter = grafted(model, gw.LoRA(rank=2))
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(**batch()).logits.square().mean().backward()
    plain = llama()
    twin = grafted(plain, gw.LoRA(rank=2))
    twin.load_tensors(adapter.tensors())
    plain(**batch()).logits.square().mean().backward()
    for ours, theirs in zip(adapter.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if "grafts" in name.split(".")
    }


@pytest.mark.parametrize("to_train", [False, True])
def test_pain_20_a_new_adapter_trains_alone_after_loading(to_train: bool, tmp_path) -> None:
    model = llama()
    gw.attach(model, gw.LoRA(rank=2), name="one")
    gw.load(model, gw.save(model, tmp_path, "one"), name="two", trainable=to_train)
    assert training(model) == ({"one", "two"} if to_train else {"one"})
    gw.attach(model, gw.LoRA(rank=2), name="three")
    assert training(model) == {"three"}


def test_pain_20_a_refused_file_leaves_who_trains_as_it_was(tmp_path) -> None:
    model = llama()
    grafted(model, gw.LoRA(rank=2), "one")
    path = gw.save(model, tmp_path, "one")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BadFile):
        gw.load(model, path, name="two", trainable=True)
    assert state(model) == (["one"], ("one",), {"one"})
    gw.attach(model, gw.LoRA(rank=2), name="three")
    assert training(model) == {"three"}


def test_pain_20_switching_off_is_the_base_and_thaws_nothing() -> None:
    model = llama()
    grafted(model, gw.LoRA(rank=2), "one")
    gw.trainable(model)
    with gw.active(model):
        assert torch.equal(logits(model, batch()), logits(llama(), batch()))
    assert training(model) == set()
