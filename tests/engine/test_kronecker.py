"""The Kronecker product with a signal against torch.kron, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graftwork.engine.kronecker import kronecker


def drawn(whole: bool) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = [(2, 3, 12), (5, 3), (2, 4)] if whole else [(2, 3, 12), (5, 3), (6, 2), (2, 4)]
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("whole", [True, False])
def test_answer_and_gradients_are_the_definition(whole: bool) -> None:
    tensors = drawn(whole)
    x, left, *right = tensors
    wanted = x @ torch.kron(left, right[0] if whole else right[0] @ right[1]).t()
    found = kronecker(*tensors)
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        torch.testing.assert_close(kronecker(*tensors), wanted)
    dy = torch.randn_like(wanted)
    for got, want in zip(
        torch.autograd.grad(found, tensors, dy), torch.autograd.grad(wanted, tensors, dy), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_under_functorch_and_autocast() -> None:
    x, left, outer, inner = drawn(whole=False)
    wanted = torch.func.jacrev(lambda c: x @ torch.kron(c, outer @ inner).t())(left)
    torch.testing.assert_close(torch.func.jacrev(lambda c: kronecker(x, c, outer, inner))(left), wanted)
    single = [tensor.detach().float().requires_grad_() for tensor in (x, left, outer, inner)]
    with torch.autocast("cpu", torch.bfloat16):
        y = kronecker(*single)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype is torch.float32 for tensor in single)


def test_only_the_signal_and_the_factors_are_kept() -> None:
    x, *factors = drawn(whole=False)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        kronecker(x, *factors)
    assert set(kept) <= {t.data_ptr() for t in (x, *factors)}
