"""Saved bytes against cases small enough to count by hand."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from graftwork.analysis.saved import saved_bytes

N, C = 8, 16


def test_an_elementwise_chain_keeps_what_each_derivative_needs():
    x = torch.randn(N, C, requires_grad=True)
    assert saved_bytes(lambda: x.sin(), [x]) == 0
    assert saved_bytes(lambda: x.sin()) == N * C * 4  # the input itself
    assert saved_bytes(lambda: (x + 1).sin(), [x]) == N * C * 4
    assert saved_bytes(lambda: (x + 1).sin().cos(), [x]) == 2 * N * C * 4
    assert saved_bytes(lambda: (x + 1) * 3 + 2, [x]) == 0  # linear: nothing


def test_a_storage_counts_once_and_in_full():
    x = torch.randn(N, C, dtype=torch.bfloat16, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x + 1
        return y.sin() + y.cos() + y[0].sin()

    assert saved_bytes(forward, [x]) == N * C * 2


def test_what_was_let_go_does_not_count():
    x = torch.randn(N, C, requires_grad=True)

    def forward() -> torch.Tensor:
        (x + 1).sin()
        return (x + 2).detach().sin()

    assert saved_bytes(forward, [x]) == 0


def test_parameters_are_left_out_and_checkpointing_keeps_its_input():
    layer = torch.nn.Linear(C, C)
    x = torch.randn(N, C)
    assert saved_bytes(lambda: layer(x), [*layer.parameters(), x]) == 0
    assert saved_bytes(lambda: layer(x), list(layer.parameters())) == N * C * 4

    def inner(y: torch.Tensor) -> torch.Tensor:
        return layer(layer(y).sin()).cos()

    frozen = [*layer.parameters(), x]
    assert saved_bytes(lambda: inner(x), frozen) == 3 * N * C * 4
    assert saved_bytes(lambda: checkpoint(inner, x, use_reentrant=False), frozen) == 0


def test_no_gradients_nothing_kept():
    x = torch.randn(N, C, requires_grad=True)
    with torch.no_grad():
        assert saved_bytes(lambda: x.sin()) == 0
