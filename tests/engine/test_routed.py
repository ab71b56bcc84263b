"""A routed batch against its rows computed one adapter at a time from the dense definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

import graftwork as gw
from graftwork.engine.routed import Rows, Stack, low_rank_routed
from graftwork.errors import RouteError
from graftwork.laws import stir

IN, OUT = 6, 5


def factors(ranks: list[int], *, grad: bool = False) -> list[tuple[Tensor, Tensor, float] | None]:
    """An adapter for each rank, None for rank 0."""
    made: list[tuple[Tensor, Tensor, float] | None] = []
    for number, rank in enumerate(ranks):
        down, up = torch.randn(rank, IN, dtype=torch.float64), torch.randn(OUT, rank, dtype=torch.float64)
        made.append((down.requires_grad_(grad), up.requires_grad_(grad), 0.5 + number) if rank else None)
    return made


def one_at_a_time(x: Tensor, weight: Tensor | None, bias: Tensor | None, adapters, index: Tensor) -> Tensor:
    """Every row or token by its own dense weight."""
    lead = x.shape[: index.dim()]
    answers = []
    for row, number in zip(
        x.reshape(index.numel(), *x.shape[index.dim() :]), index.flatten().tolist(), strict=True
    ):
        dense = torch.zeros(OUT, IN, dtype=x.dtype) if weight is None else weight
        if number >= 0 and adapters[number] is not None:
            down, up, scale = adapters[number]
            dense = dense + scale * up @ down
        answers.append(functional.linear(row, dense, bias))
    return torch.stack(answers).view(*lead, *answers[0].shape)


INDICES = {
    "even": [0, 0, 1, 1, 2, 2],
    "even, a part of the adapters": [1, 1, 1, 2, 2, 2],
    "one adapter": [2] * 6,
    "uneven": [0, 0, 0, 1, 2, 2],
    "a shorter last run": [0, 0, 0, 0, 1, 1],
    "interleaved": [0, 1, 2, 0, 1, 2],
    "with bare rows": [2, -1, 0, 1, -1, 1],
    "all bare": [-1] * 6,
    "lopsided": [0, 0, 0, 0, 0, 2],
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("tokens", [(), (1,), (7,), (40,), (2, 3)])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("hosted", [True, False])
def test_rows_equal_one_adapter_at_a_time(name, tokens, grad, hosted):
    torch.manual_seed(0)
    adapters = factors([3, 1, 2], grad=grad)
    weight, bias = torch.randn(OUT, IN, dtype=torch.float64), torch.randn(OUT, dtype=torch.float64)
    weight, bias = (weight, bias) if hosted else (None, None)
    index = torch.tensor(INDICES[name])
    x = torch.randn(6, *tokens, IN, dtype=torch.float64, requires_grad=grad)
    rows = Rows.of(index, 3)
    with torch.set_grad_enabled(grad):
        ours = low_rank_routed(x, weight, bias, Stack.of(adapters), rows)
        theirs = one_at_a_time(x, weight, bias, adapters, index)
    torch.testing.assert_close(ours, theirs)
    if grad:
        leaves = [x, *(tensor for down, up, _ in adapters for tensor in (down, up))]
        dy = torch.randn_like(ours)
        got = torch.autograd.grad(ours, leaves, dy, allow_unused=True, materialize_grads=True)
        if not (hosted or theirs.requires_grad):
            return
        want = torch.autograd.grad(theirs, leaves, dy, allow_unused=True, materialize_grads=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@settings(max_examples=60, deadline=None)
@given(
    index=some.lists(some.integers(-1, 3), min_size=1, max_size=9),
    tokens=some.sampled_from([1, 3, 30]),
    ranks=some.lists(some.integers(0, 4), min_size=4, max_size=4).filter(any),
    grad=some.booleans(),
)
def test_any_route(index, tokens, ranks, grad):
    torch.manual_seed(len(index))
    adapters, routed = factors(ranks), torch.tensor(index)
    weight, x = (
        torch.randn(OUT, IN, dtype=torch.float64),
        torch.randn(len(index), tokens, IN, dtype=torch.float64),
    )
    with torch.set_grad_enabled(grad):
        ours = low_rank_routed(x, weight, None, Stack.of(adapters), Rows.of(routed, 4))
    torch.testing.assert_close(ours, one_at_a_time(x, weight, None, adapters, routed))


def test_tokens_each_through_their_own():
    torch.manual_seed(0)
    adapters = factors([2, 4, 1], grad=True)
    weight, x = torch.randn(OUT, IN, dtype=torch.float64), torch.randn(3, 8, IN, dtype=torch.float64)
    index = torch.randint(-1, 3, (3, 8))
    ours = low_rank_routed(x, weight, None, Stack.of(adapters), Rows.of(index, 3))
    theirs = one_at_a_time(x, weight, None, adapters, index)
    torch.testing.assert_close(ours, theirs)
    leaves = [tensor for down, up, _ in adapters for tensor in (down, up)]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
    single = low_rank_routed(x[:, :1], weight, None, Stack.of(adapters), Rows.of(index[:, :1], 3))
    torch.testing.assert_close(single, ours[:, :1])


def test_low_precision_answers_in_the_host_precision():
    torch.manual_seed(0)
    adapters = [(torch.randn(4, 32), torch.randn(24, 4), 0.1) for _ in range(3)]
    x, weight = torch.randn(6, 1, 32).bfloat16(), (torch.randn(24, 32) / 6).bfloat16()
    for name in INDICES:
        index = torch.tensor(INDICES[name])
        dense = [weight.double() + 0.1 * (up @ down).double() for down, up, _ in adapters] + [weight.double()]
        expected = torch.stack(
            [functional.linear(row, dense[k]) for row, k in zip(x.double(), index, strict=True)]
        )
        for stack in (Stack.of(adapters), Stack.of(adapters, torch.bfloat16)):
            with torch.no_grad():
                y = low_rank_routed(x, weight, None, stack, Rows.of(index, 3))
            assert y.dtype == torch.bfloat16
            assert (y.double() - expected).norm() / expected.norm() < 8e-3


def test_route_that_does_not_cover_the_signal():
    x, weight = torch.randn(4, 2, IN, dtype=torch.float64), torch.randn(OUT, IN, dtype=torch.float64)
    with pytest.raises(RouteError, match=r"\(3,\)"):
        low_rank_routed(x, weight, None, Stack.of(factors([1])), Rows.of(torch.zeros(3, dtype=torch.long), 1))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 40])
def test_one_graph_serves_every_route(tokens):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    adapters = factors([3, 1, 2])
    stack, weight = Stack.of(adapters), torch.randn(OUT, IN, dtype=torch.float64)
    x = torch.randn(6, tokens, IN, dtype=torch.float64)

    @torch.compile(backend=counter, fullgraph=True)
    def run(x, rows):
        return low_rank_routed(x, weight, None, stack, rows)

    for name in INDICES:
        index = torch.tensor(INDICES[name])
        torch.testing.assert_close(run(x, Rows.of(index, 3)), one_at_a_time(x, weight, None, adapters, index))
    assert counter.frame_count == 1


def test_one_row_for_all_samples_again_and_again():
    """An input that stands for every sample is laid out for each call, also once the factors are kept."""
    host = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, IN))
    x, alone = torch.randn(1, IN), []
    for name in ("a", "b"):
        stir(gw.attach(host, gw.LoRA(rank=2), name=name))
        with torch.no_grad():
            alone.append(host(x))
    with torch.no_grad(), gw.route(host, ["a", "b"], torch.tensor([0, 1, 0])):
        for _ in range(3):
            torch.testing.assert_close(host(x), torch.cat([alone[0], alone[1], alone[0]]))


@pytest.mark.parametrize("optimizer", [{"fused": True}, {"foreach": True}, {}], ids=str)
def test_what_was_kept_falls_with_an_optimisers_step(optimizer: dict[str, bool]) -> None:
    """A fused step raises no tensor's version."""
    torch.manual_seed(0)
    host, x = nn.Sequential(nn.Linear(IN, OUT)), torch.randn(2, 4, IN)
    adapter = gw.attach(host, gw.LoRA(rank=2), name="a")
    stir(adapter)
    step = torch.optim.AdamW(adapter.parameters(), lr=0.1, **optimizer)
    with gw.route(host, ["a"], torch.zeros(2, 4, dtype=torch.long)):
        for _ in range(2):
            with torch.no_grad():
                routed = host(x)
            torch.testing.assert_close(routed, host(x).detach())
            host(x).square().mean().backward()
            step.step()


def test_what_was_kept_falls_with_other_tensors() -> None:
    host, x = nn.Sequential(nn.Linear(IN, OUT)), torch.randn(2, 4, IN)
    adapter = gw.attach(host, gw.LoRA(rank=2), name="a")
    stir(adapter)
    with gw.route(host, ["a"], torch.zeros(2, 4, dtype=torch.long)), torch.no_grad():
        before = host(x)
        adapter.load_tensors({name: tensor * 2 for name, tensor in adapter.tensors().items()})
        after = host(x)
    with gw.active(host):
        bare = host(x)
    torch.testing.assert_close(after - bare, 4 * (before - bare))
