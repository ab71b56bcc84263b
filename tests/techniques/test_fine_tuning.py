"""Full fine-tuning trains every parameter that a model reads, as plain torch does."""

from __future__ import annotations

import copy

import pytest
import torch

import graftwork as gw
from graftwork.errors import NothingMatches
from graftwork.laws import answer
from graftwork.testing import FAMILIES, tiny, tiny_batch

NEVER_READ = {"dinov2": {"dinov2.embeddings.mask_token"}}


@pytest.mark.slow
@pytest.mark.parametrize("host", FAMILIES)
def test_a_step_is_that_of_plain_torch(host: str) -> None:
    model, batch = tiny(host), tiny_batch(host)
    plain = copy.deepcopy(model).requires_grad_()
    adapter = gw.attach(model, gw.FineTuning(), head=False)
    answer(model, batch).square().mean().backward()
    answer(plain, batch).square().mean().backward()
    for parameter in (*adapter.parameters(), *plain.parameters()):
        if parameter.grad is not None:
            parameter.data -= 0.01 * parameter.grad
    unread = {name for name, p in plain.named_parameters() if p.grad is None}
    assert unread == NEVER_READ.get(host, set())
    torch.testing.assert_close(answer(model, batch), answer(plain, batch), rtol=1e-4, atol=1e-5)
    trained = sum(p.numel() for p in adapter.parameters())
    assert trained == sum(p.numel() for name, p in plain.named_parameters() if name not in unread)


def test_constants_of_a_state_space_in_some_layers() -> None:
    model, batch = tiny("mamba"), tiny_batch("mamba")
    chosen = gw.FineTuning(workspaces=("parameter.A_log", "parameter.D"), layers="last 1")
    adapter = gw.attach(model, chosen, name="constants")
    names = {name for name, _ in adapter.named_parameters()}
    assert names == {"1/parameter.A_log.weight", "1/parameter.D.weight"}
    before = answer(model, batch)
    for parameter in adapter.parameters():
        parameter.data += 0.1
    assert not torch.equal(answer(model, batch), before)
    with gw.active(model):
        assert torch.equal(answer(model, batch), before)
    attached = answer(model, batch)
    gw.merge(model)
    torch.testing.assert_close(answer(model, batch), attached)


def test_low_rank_factors_are_for_matrices() -> None:
    with pytest.raises(NothingMatches, match=r"parameter\.A_log"):
        gw.attach(tiny("mamba"), gw.LoRA(workspaces=("parameter.A_log",)))


def test_a_bare_bias_is_trained() -> None:
    class Shifted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(4))
            self.scale = torch.nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale + self.bias

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), Shifted())
    adapter = gw.attach(model, gw.FineTuning(workspaces=("parameter.*",)))
    assert {name for name, _ in adapter.named_parameters()} == {
        "parameter.bias.weight",
        "parameter.scale.weight",
    }
    x = torch.randn(5, 3)
    before = model(x)
    model(x).sum().backward()
    for name, parameter in adapter.named_parameters():
        wanted = torch.full((4,), 5.0) if "bias" in name else model[0](x).detach().sum(0)
        torch.testing.assert_close(parameter.grad, wanted)
        parameter.data += 1.0
    torch.testing.assert_close(model(x), before + model[0](x) + 1)
