"""On models: the groups that are made, updates during backward, learning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.errors import BadOption, NothingMatches, StateError
from graftwork.optimizers.galore import GaLore
from graftwork.optimizers.groups import low_rank_groups
from graftwork.optimizers.low_rank import LowRankAdamW
from graftwork.optimizers.memory import state_bytes
from graftwork.optimizers.natural_galore import NaturalGaLore
from graftwork.optimizers.per_layer import per_layer
from graftwork.testing import tiny, tiny_batch

Make = Callable[[list[dict[str, object]]], LowRankAdamW]
MAKES: list[Make] = [
    lambda groups: GaLore(groups, 0.01, refresh_interval=3),
    lambda groups: NaturalGaLore(groups, 0.01, refresh_interval=3, history=4, weight_decay=0.1),
]


def names(model: nn.Module, group: dict[str, object]) -> set[str]:
    known = {id(p): name for name, p in model.named_parameters()}
    return {known[id(p)] for p in group["params"]}  # type: ignore[attr-defined]


def test_by_default_the_matrices_of_the_layers_are_projected() -> None:
    model = tiny("llama")
    low, others = low_rank_groups(model, rank=4)
    assert names(model, low) == {
        name for name, p in model.named_parameters() if ".layers." in name and p.ndim > 1
    }
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= names(model, others)
    assert len(low["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_targets_choose_by_name() -> None:
    model = tiny("llama")
    low, _ = low_rank_groups(model, rank=4, targets=["q_proj", "mlp"])
    assert all("q_proj" in name or "mlp" in name for name in names(model, low))
    assert any("q_proj" in name for name in names(model, low))


def test_frozen_parameters_and_small_matrices_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 8))
    model[2].requires_grad_(False)
    low, others = low_rank_groups(model, rank=2)
    assert (names(model, low), names(model, others)) == ({"0.weight"}, {"0.bias", "1.weight", "1.bias"})


@pytest.mark.parametrize(
    "rank, targets, error, text",
    [
        (64, None, NothingMatches, "lower the rank"),
        (2, ["1.wieght"], NothingMatches, "Did you mean 1.weight"),
        (2, [], NothingMatches, "targets is empty"),
        (4, ["1.weight"], BadOption, r"rank=4 is above the shorter side 2 of 1.weight \(2 x 8\)"),
    ],
)
def test_groups_that_cannot_be_made(
    rank: int, targets: list[str] | None, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        low_rank_groups(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), rank=rank, targets=targets)


def learn(model: nn.Module, optimizer: LowRankAdamW, steps: int) -> list[float]:
    batch, losses = tiny_batch("llama"), []
    for _ in range(steps):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_learns(make: Make, dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    optimizer = make(low_rank_groups(model, rank=4))
    losses = learn(model, optimizer, 15)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("make", MAKES)
def test_updates_during_backward_are_the_same_steps(make: Make) -> None:
    usual, eager = tiny("llama"), tiny("llama")
    eager.load_state_dict(usual.state_dict())
    learn(usual, make(low_rank_groups(usual, rank=4)), 5)
    optimizer = make(low_rank_groups(eager, rank=4))
    held: list[int] = []
    count = lambda _: held.append(sum(p.grad is not None for p in eager.parameters()))  # noqa: E731
    with per_layer(optimizer):
        watch = [p.register_post_accumulate_grad_hook(count) for p in eager.parameters()]
        learn(eager, optimizer, 3)
        assert set(held) == {0}  # after its own update no gradient is left, of it or of any other
        optimizer.load_state_dict(optimizer.state_dict())
        learn(eager, optimizer, 2)
    for a, b in zip(usual.parameters(), eager.parameters()):
        assert torch.equal(a, b)
    for handle in watch:
        handle.remove()
    before = {name: p.detach().clone() for name, p in eager.named_parameters()}
    eager(**tiny_batch("llama"), labels=tiny_batch("llama")["input_ids"]).loss.backward()
    assert all(torch.equal(p, before[name]) for name, p in eager.named_parameters())


def test_a_gradient_that_waits_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = GaLore(low_rank_groups(model, rank=2))
    model(torch.ones(1, 8)).sum().backward()
    with pytest.raises(StateError, match="zero_grad"):
        per_layer(optimizer)


def test_an_adapter_of_whole_weights_learns_with_less_state() -> None:
    model = tiny("llama")
    gw.attach(model, gw.FineTuning(workspaces=["attention.*", "feedforward.*"]))
    optimizer = gw.GaLore(low_rank_groups(model, rank=2), lr=0.01)
    losses = learn(model, optimizer, 10)
    assert losses[-1] < losses[0]
    full = sum(2 * 4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert state_bytes(optimizer)["total"] < full / 2


def test_public_names() -> None:
    assert gw.GaLore is GaLore
    assert gw.NaturalGaLore is NaturalGaLore
