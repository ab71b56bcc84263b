"""The lean host: the loss and gradients of the host's own forward, fewer bytes kept, a warning where it yields."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import graftwork as gw
from graftwork.analysis.saved import saved_bytes
from graftwork.engine.lean_host import lean
from graftwork.engine.recompute import enable_checkpointing
from graftwork.errors import StateError
from graftwork.testing import tiny

IDS = torch.arange(3, 51).view(2, 24)


def attached(host: str = "llama", **options: float) -> tuple[nn.Module, gw.Adapter]:
    model = tiny(host)
    torch.manual_seed(0)
    adapter = gw.attach(model, gw.LoRA(rank=3, workspaces=("all-linear",), **options))  # type: ignore[arg-type]
    for parameter in adapter.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model.train(), adapter


def step(model: nn.Module, adapter: gw.Adapter) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in adapter.parameters() if p.grad is not None]


@pytest.mark.parametrize("host", ["llama", "mistral", "qwen3", "gemma2", "gpt2"])
def test_loss_and_gradients_are_the_hosts_own(host: str) -> None:
    loss, gradients = step(*attached(host))
    model, adapter = attached(host)
    lean(model)
    found, lean_gradients = step(model, adapter)
    assert torch.allclose(found, loss, rtol=1e-5)
    for one, other in zip(lean_gradients, gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


def test_what_is_taken_is_found_by_trying() -> None:
    model, _ = attached("llama")
    assert lean(model).taken == {"feedforward": 2, "norm": 5, "loss": 1}
    gemma, _ = attached("gemma2")
    report = lean(gemma)
    assert "loss" not in report.taken  # its logits are capped
    assert "norm" not in report.taken  # its gain is 1 + weight
    assert "changes the logits behind the head" in report.left[""]


def test_it_keeps_less() -> None:
    def kept(model: nn.Module) -> int:
        return saved_bytes(
            lambda: model(input_ids=IDS, labels=IDS).loss, [*model.parameters(), *model.buffers(), IDS]
        )

    model, _ = attached("llama")
    plain = kept(model)
    lean(model)
    slim = kept(model)
    assert slim < 0.8 * plain
    lean(model, feedforward=False, norm=False, loss=False)
    assert kept(model) == plain


def test_dropout_yields_to_the_host_and_says_so() -> None:
    model, adapter = attached("llama", dropout=0.5)
    lean(model, norm=False, loss=False)
    with pytest.warns(UserWarning, match="runs as usual: dropout"):
        step(model, adapter)


def test_a_hook_on_a_projection_is_still_called() -> None:
    model, adapter = attached("llama")
    lean(model)
    seen: list[int] = []
    model.get_submodule("model.layers.0.mlp.gate_proj").register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="hook"):
        step(model, adapter)
    assert seen


def test_other_techniques_and_routes_are_right() -> None:
    model, adapter = attached("llama")
    gw.attach(model, gw.IA3(), name="scale")
    with torch.no_grad():
        for parameter in gw.adapters(model)["scale"].parameters():
            parameter.add_(0.3)
    results = []
    for on in (False, True):
        lean(model, feedforward=on, norm=on, loss=on)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with gw.active(model, "default", "scale"):
                stacked = model(input_ids=IDS, labels=IDS).loss
            with gw.route(model, ["default", "scale"], torch.tensor([1, 0])):
                routed = model(input_ids=IDS, labels=IDS).loss
        results.append(torch.stack([stacked, routed]).detach())
    assert torch.allclose(results[0], results[1], rtol=1e-5)
    assert adapter.count() > 0


def test_recomputation_agrees() -> None:
    _, wanted = step(*attached("llama"))
    model, adapter = attached("llama")
    lean(model)
    enable_checkpointing(model)
    _, found = step(model, adapter)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_evaluation_has_logits_as_ever() -> None:
    model, _ = attached("llama")
    wanted = model.eval()(input_ids=IDS, labels=IDS)
    lean(model)
    found = model(input_ids=IDS, labels=IDS)
    assert torch.allclose(found.logits, wanted.logits, atol=1e-5)
    assert model.train()(input_ids=IDS, labels=IDS).logits is None


def test_detach_leaves_nothing() -> None:
    model = tiny("llama")
    before = [(type(m), sorted(m.__dict__)) for m in model.modules()]
    gw.attach(model, gw.LoRA())
    lean(model)
    gw.detach(model)
    assert [(type(m), sorted(m.__dict__)) for m in model.modules()] == before
    with pytest.raises(StateError):
        lean(model)
