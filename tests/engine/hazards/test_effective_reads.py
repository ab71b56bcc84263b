"""A parameter reads in effective form only while its owner runs, and never while the site itself is
called."""

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.errors import StateError
from graftwork.testing import tiny

from .kit import batch, gradients, grafted, largest_gap, llama, loss_of


class Reader(nn.Module):
    """Reads its linear layer's weight and never calls it."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 3)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.proj.weight, self.proj.bias)


class Both(nn.Module):
    """Calls one layer and reads another, several times."""

    def __init__(self):
        super().__init__()
        self.inner = Reader()
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.inner(x)) + self.inner(x) @ self.last.weight.T


LORA = {"rank": 2, "workspaces": ("re:.*proj",)}


def _effective(module: nn.Module, adapter: gw.Adapter) -> torch.Tensor:
    (graft,) = adapter.modules.values()
    return module.weight.detach() + graft.scale * graft.up @ graft.down


def test_a_weight_that_is_only_read_is_adapted_and_trained():
    model, x = Both(), torch.randn(5, 4)
    adapter = grafted(model, gw.LoRA(**LORA))
    weight = _effective(model.inner.proj, adapter)
    inside = x @ weight.T + model.inner.proj.bias
    wanted = model.last(inside) + inside @ model.last.weight.T
    torch.testing.assert_close(model(x), wanted)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in (model.inner.proj.weight, model.last.weight))


def test_outside_a_forward_the_stored_tensor_is_read():
    model = Reader()
    stored = model.proj.weight
    grafted(model, gw.LoRA(**LORA))
    assert model.proj.weight is stored
    assert isinstance(model.proj.weight, nn.Parameter)
    assert model.get_parameter("proj.weight") is stored
    assert model.proj.weight.is_leaf


def test_the_owner_opens_the_scope_and_not_the_root():
    """A parent other than the owner running is not enough; the owner running alone (recomputation) is."""
    model, x = Both(), torch.randn(5, 4)
    adapter = grafted(model, gw.LoRA(**LORA))
    seen = []
    model.last.register_forward_pre_hook(lambda *_: seen.append(model.inner.proj.weight))
    model(x)
    assert seen[0] is model.inner.proj._parameters["weight"]
    weight = _effective(model.inner.proj, adapter)
    torch.testing.assert_close(model.inner(x), x @ weight.T + model.inner.proj.bias)


def test_hooks_of_the_site_see_the_stored_weight():
    model = nn.Sequential(nn.Linear(4, 4))
    adapter = grafted(model, gw.LoRA(rank=2, workspaces=("re:0",)))
    seen = []
    model[0].register_forward_pre_hook(lambda module, _: seen.append(module.weight))
    model[0].register_forward_hook(lambda module, *_: seen.append(module.weight))
    model(torch.randn(2, 4))
    assert len(seen) == 2
    assert all(weight is model[0]._parameters["weight"] for weight in seen)
    assert adapter.count() == 16


def test_an_error_in_the_forward_closes_the_scope():
    model = Reader()
    grafted(model, gw.LoRA(**LORA))
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 7))
    assert model.proj.weight is model.proj._parameters["weight"]


def test_a_bias_that_is_only_read_is_adapted():
    model, x = Reader(), torch.randn(5, 4)
    before = model(x)
    adapter = grafted(model, gw.BitFit(workspaces=("re:proj",)))
    (graft,) = adapter.modules.values()
    torch.testing.assert_close(model(x), before + graft.delta)
    model(x).sum().backward()
    assert graft.delta.grad is not None


WRITES = {
    "data": lambda m: m.weight.data.fill_(7.0),
    "copy_": lambda m: m.weight.detach().copy_(torch.full_like(m.weight, 7.0)),
    "no_grad": lambda m: _no_grad_fill(m),
    "init": lambda m: nn.init.constant_(m.weight, 7.0),
    "data assignment": lambda m: setattr(m.weight, "data", torch.full_like(m.weight, 7.0)),
    "assignment": lambda m: setattr(m, "weight", nn.Parameter(torch.full_like(m.weight, 7.0))),
    "load": lambda m: m.load_state_dict({"weight": torch.full_like(m.weight, 7.0), "bias": m.bias}),
}


def _no_grad_fill(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight.fill_(7.0)


@pytest.mark.parametrize("write", WRITES)
def test_a_write_lands_in_the_stored_tensor(write):
    model = nn.Sequential(nn.Linear(4, 4))
    grafted(model, gw.LoRA(rank=2, workspaces=("re:0",)))
    WRITES[write](model[0])
    assert torch.equal(model[0]._parameters["weight"], torch.full((4, 4), 7.0))
    x = torch.randn(2, 4)
    with gw.active(model):
        torch.testing.assert_close(model(x), x @ torch.full((4, 4), 7.0).T + model[0].bias)


def test_reset_parameters_writes_the_stored_tensor():
    model = nn.Sequential(nn.Linear(4, 4))
    grafted(model, gw.LoRA(rank=2, workspaces=("re:0",)))
    before = model[0].weight.clone()
    model[0].reset_parameters()
    assert not torch.equal(model[0]._parameters["weight"], before)


def test_the_base_keeps_its_flags_of_training():
    model = Reader()
    model.proj.bias.requires_grad_(False)
    gw.attach(model, gw.LoRA(**LORA))
    assert [p.requires_grad for p in (model.proj.weight, model.proj.bias)] == [False, False]
    gw.detach(model)
    assert [p.requires_grad for p in (model.proj.weight, model.proj.bias)] == [True, False]


def test_a_faulty_module_is_not_taken_for_a_missing_weight(monkeypatch):
    """torch turns an AttributeError inside a property into "no such attribute"."""
    model = Reader()
    adapter = gw.attach(model, gw.LoRA(**LORA))
    (graft,) = adapter.modules.values()

    def broken():
        raise AttributeError("inner mistake")

    monkeypatch.setattr(graft, "delta", broken)
    with pytest.raises(StateError, match="inner mistake"):
        model(torch.randn(2, 4))


def test_the_effective_weight_of_a_replaced_one():
    """torch.func hands in other tensors by the same name; the adapter works on these."""
    model, x = Reader(), torch.randn(5, 4)
    adapter = grafted(model, gw.LoRA(**LORA))
    (graft,) = adapter.modules.values()
    other = {"proj.weight": torch.randn(3, 4), "proj.bias": torch.zeros(3)}
    out = torch.func.functional_call(model, other, (x,))
    torch.testing.assert_close(out, x @ (other["proj.weight"] + graft.delta()).T)


def _mamba_gradients(checkpointing: bool, reentrant: bool) -> dict[str, torch.Tensor]:
    model = tiny("mamba").train()
    adapter = grafted(model, gw.LoRA(rank=2, workspaces=("ssm.dt", "ssm.out")))
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    loss_of(model, batch("mamba")).backward()
    return gradients(adapter)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_mamba_gradients_do_not_depend_on_checkpointing(reentrant):
    plain = _mamba_gradients(False, reentrant)
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    assert largest_gap(plain, _mamba_gradients(True, reentrant)) == 0.0


def test_the_llama_starts_silent_and_ends_bitwise():
    model, inputs = llama(), batch()
    before = model(**inputs).logits
    names = [type(module) for module in model.modules()]
    inside = [set(module.__dict__) for module in model.modules()]
    adapter = gw.attach(model, gw.LoRA(rank=4))
    assert torch.equal(model(**inputs).logits, before)
    loss_of(model, inputs).backward()
    assert all(p.grad is not None for p in adapter.parameters())
    gw.detach(model)
    assert torch.equal(model(**inputs).logits, before)
    assert [type(module) for module in model.modules()] == names
    assert [set(module.__dict__) for module in model.modules()] == inside
