"""A frozen product between trained vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graftwork.engine.scaled_product import scaled_product

IN, RANK, OUT = 6, 4, 5


def made(*lead: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((*lead, IN), (RANK, IN), (RANK,), (OUT, RANK), (OUT,))
    x, down, inner, up, outer = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    return x.requires_grad_(), down, inner.requires_grad_(), up, outer.requires_grad_()


def dense(x: Tensor, down: Tensor, inner: Tensor, up: Tensor, outer: Tensor) -> Tensor:
    return x @ (outer.diag() @ up @ inner.diag() @ down).mT


@pytest.mark.parametrize("lead", [(), (3,), (2, 64), (2, 0)])
def test_it_is_the_dense_product_and_so_are_its_gradients(lead: tuple[int, ...]) -> None:
    tensors = made(*lead)
    y, expected = scaled_product(*tensors), dense(*tensors)
    torch.testing.assert_close(y, expected)
    trained, dy = (tensors[0], tensors[2], tensors[4]), torch.randn_like(expected)
    for found, own in zip(
        torch.autograd.grad(y, trained, dy), torch.autograd.grad(expected, trained, dy), strict=True
    ):
        torch.testing.assert_close(found, own)


def test_vectors_at_zero_learn() -> None:
    x, down, inner, up, outer = made(3)
    zero = torch.zeros_like(outer).requires_grad_()
    scaled_product(x, down, inner, up, zero).sum().backward()
    assert zero.grad is not None
    torch.testing.assert_close(zero.grad, (x.detach() @ down.mT * inner.detach() @ up.mT).sum(0))


def test_low_precision_signals_and_autocast_keep_theirs() -> None:
    tensors = [tensor.detach().float() for tensor in made(3)]
    assert scaled_product(tensors[0].bfloat16(), *tensors[1:]).dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled_product(*tensors).dtype is torch.bfloat16


def test_second_derivatives_are_an_error() -> None:
    tensors = made(3)
    (first,) = torch.autograd.grad(scaled_product(*tensors).square().sum(), tensors[2], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
