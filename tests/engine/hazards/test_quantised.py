"""Linears that bitsandbytes keeps in 8 or 4 bits, on the CPU."""

import copy

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.errors import NotMergeable

from .kit import gradients, grafted, largest_gap

bnb = pytest.importorskip("bitsandbytes")

TECHNIQUES = {
    "lora": lambda: gw.LoRA(rank=2, workspaces=("re:0",)),
    "ia3": lambda: gw.IA3(workspaces=("re:0",)),
    "bottleneck": lambda: gw.BottleneckAdapter(width=4, workspaces=("re:0",)),
    "bias": lambda: gw.BitFit(workspaces=("re:0",)),
}


def _layer(bits: int) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Linear(64, 64)
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    return nn.Sequential(layer.to("cpu"), nn.Tanh()).requires_grad_(False)


@pytest.fixture(params=[4, 8], ids=["4-bit", "8-bit"])
def model(request) -> nn.Module:
    made = _layer(request.param)
    try:
        made(torch.randn(2, 64))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes does not run here: {error}")
    return made


@pytest.mark.parametrize("name", TECHNIQUES)
def test_runs_trains_and_comes_off_bitwise(model, name):
    x = torch.randn(3, 64)
    base = model(x)
    state = {
        key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)
    }
    adapter = grafted(model, TECHNIQUES[name]())
    (graft,) = adapter.modules.values()
    out, linear = model(x), torch.atanh(base)
    wanted = {
        "lora": lambda: linear + x @ graft.delta().T,
        "ia3": lambda: linear * graft.scale,
        "bottleneck": lambda: linear + graft(linear),
        "bias": lambda: linear + graft.delta,
    }[name]()
    torch.testing.assert_close(out, torch.tanh(wanted), atol=5e-3, rtol=5e-3)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    gw.detach(model)
    assert torch.equal(model(x), base)
    now = model.state_dict()
    assert all(torch.equal(now[key], value) for key, value in state.items())


def test_a_copy_equals(model):
    grafted(model, TECHNIQUES["lora"]())
    x = torch.randn(3, 64)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_a_dense_technique_on_the_dequantised_weight(model):
    x = torch.randn(3, 64)
    base = model(x)
    adapter = gw.attach(model, gw.FineTuning(workspaces=("re:0",)))
    torch.testing.assert_close(model(x), base, atol=2e-2, rtol=2e-2)
    model(x).sum().backward()
    assert gradients(adapter)


def test_merging_is_refused(model):
    grafted(model, TECHNIQUES["lora"]())
    with pytest.raises(NotMergeable, match="quantised"):
        gw.merge(model)


def test_gradients_reach_below_a_quantised_layer(model):
    below = nn.Linear(64, 64)
    whole = nn.Sequential(below, model[0])
    adapter = grafted(whole, gw.LoRA(rank=2, workspaces=("re:[01]",)))
    whole(torch.randn(3, 64)).sum().backward()
    assert largest_gap(gradients(adapter), {k: 0 * v for k, v in gradients(adapter).items()}) > 0
    assert all(value.abs().max() > 0 for value in gradients(adapter).values())
