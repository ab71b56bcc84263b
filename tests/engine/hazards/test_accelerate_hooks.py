"""accelerate's hooks sit on the instance, in front of any class; offloaded weights live elsewhere between
calls."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import graftwork as gw
from graftwork.errors import PortUnavailable, StateError

from .kit import batch, gradients, grafted, largest_gap, llama, loss_of, techniques


def _hooked(model: nn.Module) -> None:
    for module in model.modules():
        if not list(module.children()):
            add_hook_to_module(module, ModelHook())


def _reference(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = llama()
    adapter = grafted(model, techniques()[name])
    loss_of(model, batch()).backward()
    return model(**batch()).logits.detach(), gradients(adapter)


@pytest.mark.parametrize("name", techniques())
def test_hooks_then_attach_then_detach(name):
    wanted, wanted_gradients = _reference(name)
    model = llama()
    bare = model(**batch()).logits
    _hooked(model)
    adapter = grafted(model, techniques()[name])
    assert torch.equal(model(**batch()).logits, wanted)
    loss_of(model, batch()).backward()
    assert largest_gap(gradients(adapter), wanted_gradients) == 0.0
    gw.detach(model)
    assert torch.equal(model(**batch()).logits, bare)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(**batch()).logits, bare)
    assert not any("_graft" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", techniques())
def test_attach_then_hooks_then_detach(name):
    wanted, _ = _reference(name)
    model = llama()
    bare = model(**batch()).logits
    grafted(model, techniques()[name])
    _hooked(model)
    assert torch.equal(model(**batch()).logits, wanted)
    gw.detach(model)
    assert torch.equal(model(**batch()).logits, bare)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(**batch()).logits, bare)


def test_hooks_removed_under_an_adapter():
    wanted, _ = _reference("ia3")
    model = llama()
    _hooked(model)
    grafted(model, techniques()["ia3"])
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(**batch()).logits, wanted)


def _cpu(model: nn.Module, folder) -> nn.Module:
    return cpu_offload(model, torch.device("cpu"))


def _disk(model: nn.Module, folder) -> nn.Module:
    disk_offload(model, folder, torch.device("cpu"))
    return model


def _mapped(model: nn.Module, folder) -> nn.Module:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("name", techniques())
@pytest.mark.parametrize("offload", [_cpu, _disk, _mapped])
def test_offloaded_then_attach(name, offload, tmp_path):
    wanted, wanted_gradients = _reference(name)
    model = offload(llama(), tmp_path)
    adapter = grafted(model, techniques()[name])
    assert {parameter.device.type for parameter in adapter.parameters()} == {"cpu"}
    torch.testing.assert_close(model(**batch()).logits, wanted)
    loss_of(model, batch()).backward()
    assert largest_gap(gradients(adapter), wanted_gradients) < 1e-6
    ours = {id(parameter) for parameter in adapter.parameters()}
    assert not [key for key, p in model.named_parameters() if p.requires_grad and id(p) not in ours]


def test_a_module_offloaded_as_a_whole_is_refused(tmp_path):
    """Its hook would take the adapter's tensors for its own and lose what they learn."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "disk"}
    whole = {"preload_module_classes": ["LlamaAttention"], "offload_dir": tmp_path, "main_device": "cpu"}
    model = dispatch_model(llama(), places, force_hooks=True, **whole)
    with pytest.raises(PortUnavailable, match="offloaded as a whole"):
        gw.attach(model, techniques()["lora"])
    assert not any("_graft" in module.__dict__ for module in model.modules())


def test_attach_then_offload_is_refused():
    model = llama()
    grafted(model, techniques()["lora"])
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(StateError, match="first, then attach"):
        model(**batch())


@pytest.mark.slow
@pytest.mark.parametrize("name", techniques())
def test_prepare_leaves_a_model_that_detaches(name):
    from accelerate import Accelerator

    model = llama()
    bare = model(**batch()).logits
    adapter = grafted(model, techniques()[name])
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(loss_of(prepared, batch()))
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    optimizer.step()
    accelerator.unwrap_model(prepared)
    gw.detach(model)
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(model(**batch()).logits, bare)
    accelerator.free_memory()


def test_save_state_and_load_state(tmp_path):
    from accelerate import Accelerator

    model = llama()
    adapter = grafted(model, techniques()["lora"])
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        accelerator.backward(loss_of(prepared, batch()))
        optimizer.step()

    step()
    accelerator.save_state(tmp_path)
    step()
    after = {name: value.clone() for name, value in adapter.tensors().items()}
    accelerator.load_state(tmp_path)
    assert largest_gap(after, adapter.tensors()) > 0
    step()
    assert largest_gap(after, adapter.tensors()) == 0.0
    accelerator.free_memory()
