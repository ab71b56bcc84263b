"""Whoever changes a module's class, weight or hooks before or after attach keeps what they did."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import graftwork as gw
from graftwork.errors import StateError

from .kit import grafted


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _weight_norm_hook(layer: nn.Module) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)


CHANGES = {
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Double()),
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "parametrized orthogonal": parametrizations.orthogonal,
    "weight_norm by hook": _weight_norm_hook,
    "spectral_norm by hook": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.4),
}
AT = {"workspaces": ("re:0",)}
TECHNIQUES = {
    "low rank": gw.LoRA(rank=2, **AT),
    "dense": gw.FineTuning(**AT),
    "bias": gw.BitFit(**AT),
    "hidden": gw.IA3(**AT),
}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh()).eval()


def _by_formula(
    model: nn.Module, name: str, adapter: gw.Adapter, x: torch.Tensor, base: torch.Tensor
) -> torch.Tensor:
    """The adapted answer from the base's own linear answer, by the technique's definition."""
    (graft,) = adapter.modules.values()
    linear = torch.atanh(base)
    changed = {
        "low rank": lambda: linear + graft.scale * x @ graft.down.T @ graft.up.T,
        "dense": lambda: x @ graft.weight.T + graft.bias,
        "bias": lambda: linear + graft.delta,
        "hidden": lambda: linear * graft.scale,
    }
    return torch.tanh(changed[name]())


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_before_attach(name, change):
    model, x = _model(), 0.3 * torch.randn(3, 4)
    CHANGES[change](model[0])
    kind, keys, base = type(model[0]), list(model.state_dict()), model(x)
    adapter = grafted(model, TECHNIQUES[name])
    torch.testing.assert_close(model(x), _by_formula(model, name, adapter, x, base), atol=1e-5, rtol=1e-4)
    gw.detach(model)
    assert type(model[0]) is kind
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_after_attach(name, change):
    """Right, or refused with the reason; the base never takes in the adapter."""
    reference, x = _model(), 0.3 * torch.randn(3, 4)
    model = _model()
    adapter = grafted(model, TECHNIQUES[name])
    torch.manual_seed(7)
    CHANGES[change](reference[0])
    torch.manual_seed(7)
    CHANGES[change](model[0])
    base = reference(x)
    with gw.active(model):
        torch.testing.assert_close(model(x), base)
    if name == "dense" and hasattr(model[0], "parametrizations"):
        with pytest.raises(StateError, match="parametrized after attach"):
            model(x)
    else:
        out = model(x)
        torch.testing.assert_close(out, _by_formula(model, name, adapter, x, base), atol=1e-5, rtol=1e-4)


def test_detach_refuses_to_drop_a_class_made_after_attach():
    model = _model()
    grafted(model, TECHNIQUES["low rank"])
    parametrize.register_parametrization(model[0], "weight", Double())
    before = model(torch.ones(1, 4))
    with pytest.raises(StateError, match="ParametrizedLinear"):
        gw.detach(model)
    assert torch.equal(model(torch.ones(1, 4)), before)
    parametrize.remove_parametrizations(model[0], "weight")
    gw.detach(model)
    assert type(model[0]) is nn.Linear


def test_detach_after_weight_norm_by_hook():
    model, x = _model(), torch.randn(2, 4)
    grafted(model, TECHNIQUES["low rank"])
    _weight_norm_hook(model[0])
    gw.detach(model)
    reference = _model()
    torch.testing.assert_close(model(x), reference(x))
    nn.utils.remove_weight_norm(model[0])
    torch.testing.assert_close(model(x), reference(x))


def test_prune_then_remove_under_an_adapter():
    model = _model()
    grafted(model, TECHNIQUES["low rank"])
    prune.l1_unstructured(model[0], "weight", 0.5)
    stored = model[0].weight.clone()
    prune.remove(model[0], "weight")
    assert torch.equal(model[0]._parameters["weight"], stored)
    assert int((stored == 0).sum()) == 8


def test_user_hooks_survive_and_see_the_adapted_answer():
    model, x = _model(), torch.randn(2, 4, requires_grad=True)
    seen = {"pre": 0, "out": None, "grad": 0}
    model[0].register_forward_pre_hook(lambda *_: seen.update(pre=seen["pre"] + 1))
    model[0].register_forward_hook(lambda _m, _x, out: seen.update(out=out))
    model[0].register_full_backward_hook(lambda *_: seen.update(grad=seen["grad"] + 1))
    adapter = grafted(model, TECHNIQUES["low rank"])
    (graft,) = adapter.modules.values()
    model(x).sum().backward()
    wanted = x @ (model[0].weight + graft.delta()).T + model[0].bias
    torch.testing.assert_close(seen["out"], wanted)
    assert (seen["pre"], seen["grad"]) == (1, 1)
    gw.detach(model)
    model(x).sum().backward()
    torch.testing.assert_close(seen["out"], x @ model[0].weight.T + model[0].bias)
    assert (seen["pre"], seen["grad"]) == (2, 2)


def test_a_forward_patched_onto_the_instance_is_refused():
    model = _model()
    model[0].forward = lambda x: x
    with pytest.raises(StateError, match="forward is set on the instance"):
        gw.attach(model, TECHNIQUES["hidden"])
    assert not hasattr(model[0], "grafts")
    assert type(model) is nn.Sequential


def test_one_module_under_two_names():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    adapter = grafted(model, gw.LoRA(rank=2, workspaces=("re:[02]",)))
    assert len(adapter.modules) == 1
    (graft,) = adapter.modules.values()
    x = torch.randn(3, 4)
    weight = layer.weight + graft.delta()
    wanted = torch.tanh(x @ weight.T + layer.bias) @ weight.T + layer.bias
    torch.testing.assert_close(model(x), wanted)
    model(x).sum().backward()
    got = graft.up.grad.clone()
    graft.up.grad = None
    wanted.sum().backward()
    torch.testing.assert_close(got, graft.up.grad)
