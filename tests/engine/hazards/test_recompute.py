"""A recomputation sees the active set and the route of its own forward, whatever was set since."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import graftwork as gw
from graftwork.engine.recompute import enable_checkpointing
from graftwork.errors import BadOption, StateError
from graftwork.testing import tiny

from .kit import PROJECTIONS, batch, gradients, grafted, largest_gap, llama, loss_of

INDEX = torch.tensor([0, -1, 1])


def _two(before_attach: bool, reentrant: bool | None) -> tuple[nn.Module, list[gw.Adapter]]:
    model = llama().train()
    if before_attach:
        _checkpoint(model, reentrant)
    adapters = [
        grafted(model, gw.LoRA(rank=2, workspaces=PROJECTIONS), "a", seed=1, verify=False),
        grafted(model, gw.BottleneckAdapter(width=4, workspaces=("feedforward",)), "b", seed=2, verify=False),
    ]
    gw.trainable(model, "a", "b")
    if not before_attach:
        _checkpoint(model, reentrant)
    return model, adapters


def _checkpoint(model: nn.Module, reentrant: bool | None) -> None:
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()


def _all(adapters: list[gw.Adapter]) -> dict[str, Tensor]:
    return {f"{a.name}/{key}": value for a in adapters for key, value in gradients(a).items()}


def _route_left(model):
    with gw.route(model, ["a", "b"], INDEX):
        return loss_of(model, batch())


def _set_switched(model):
    gw.active(model, "a", "b")
    loss = loss_of(model, batch())
    gw.active(model, "b")
    return loss


def _switched_off(model):
    gw.active(model, "b", "a")
    loss = loss_of(model, batch())
    gw.active(model)
    return loss


def _two_routes(model):
    with gw.route(model, ["a", "b"], INDEX):
        first = loss_of(model, batch())
    with gw.route(model, ["b", "a"], INDEX):
        second = loss_of(model, batch(seed=5))
    gw.active(model)
    return first + second


@pytest.mark.parametrize("before_attach", [True, False], ids=["enabled before", "enabled after"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("run", [_route_left, _set_switched, _switched_off, _two_routes])
def test_gradients_are_those_of_the_forward(run, reentrant, before_attach):
    model, adapters = _two(False, None)
    run(model).backward()
    wanted = _all(adapters)
    model, adapters = _two(before_attach, reentrant)
    run(model).backward()
    assert largest_gap(wanted, _all(adapters)) < 1e-6


def _saved_elements(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, inputs)
    return sum(sizes)


@pytest.mark.parametrize("workspaces", [("layer",), ("attention.query", "layer")])
def test_a_swapped_layer_still_checkpoints(workspaces):
    """Every layer is a site itself; what is kept must be what the bare base keeps, not the layers'
    insides."""
    base = llama().train()
    base.activation_checkpointing_enable({"use_reentrant": False})
    bare = _saved_elements(base, batch())
    model = llama().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    grafted(model, gw.BottleneckAdapter(width=4, workspaces=workspaces, init="near-identity"))
    kept = _saved_elements(model, batch())
    model.activation_checkpointing_disable()
    assert kept <= 1.1 * bare
    assert kept < 0.5 * _saved_elements(model, batch())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_as_a_site_gets_the_same_gradients(reentrant):
    out = []
    for checkpointing in (False, True):
        model = llama().train()
        adapter = grafted(model, gw.BottleneckAdapter(width=4, workspaces=("layer",)))
        _checkpoint(model, reentrant if checkpointing else None)
        loss_of(model, batch()).backward()
        out.append(gradients(adapter))
    assert largest_gap(*out) < 1e-6


def test_dropout_repeats_in_the_recomputation():
    out = []
    for checkpointing in (False, True):
        model = llama().train()
        adapter = grafted(model, gw.LoRA(rank=4, dropout=0.3, workspaces=PROJECTIONS))
        _checkpoint(model, False if checkpointing else None)
        torch.manual_seed(3)
        loss_of(model, batch()).backward()
        out.append(gradients(adapter))
    assert largest_gap(*out) < 1e-6


def test_the_stored_function_comes_back():
    model = llama().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    layer = model.model.layers[0]
    before = layer.__dict__["_gradient_checkpointing_func"]
    gw.attach(model, gw.LoRA(rank=2))
    gw.detach(model)
    assert layer._gradient_checkpointing_func is before


def test_an_encoder_decoder_is_recomputed_right():
    out = []
    inputs = batch("t5")
    for checkpointing in (False, True):
        model = tiny("t5").train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        adapter = grafted(model, gw.LoRA(rank=2, workspaces=("re:.*\\.(q|v)",)))
        _checkpoint(model, False if checkpointing else None)
        loss = model(**inputs, labels=inputs["decoder_input_ids"], use_cache=False).loss
        gw.active(model)
        loss.backward()
        out.append(gradients(adapter))
    assert largest_gap(*out) < 1e-6


def test_a_checkpoint_of_the_users_own_tells_of_a_change():
    """torch.utils.checkpoint around a submodule: nobody carries the state, so a change in between is
    refused."""
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    grafted(model, gw.LoRA(rank=2, workspaces=("re:[02]",)), "a")
    grafted(model, gw.LoRA(rank=2, workspaces=("re:[02]",)), "b", seed=2)
    x = torch.randn(3, 4, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = checkpoint(model, x, use_reentrant=True)
    gw.active(model, "a")
    with pytest.raises(StateError, match="recomput"):
        out.sum().backward()


class OlderModel(nn.Module):
    """A model of transformers before the method was renamed."""

    def gradient_checkpointing_enable(self, options: dict[str, bool]) -> None:
        self.options = options


def test_checkpointing_goes_on_by_the_newest_name_without_a_warning():
    model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_checkpointing(model)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    older = OlderModel()
    enable_checkpointing(older, reentrant=True)
    assert older.options == {"use_reentrant": True}
    with pytest.raises(BadOption, match="Linear cannot recompute"):
        enable_checkpointing(nn.Linear(1, 1))
