"""Block-diagonal products on the channels of a signal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graftwork.engine.blockwise import blockwise


def dense(x: Tensor, blocks: Tensor) -> Tensor:
    return x @ torch.block_diag(*blocks).mT


def made(*lead: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(*lead, 12, generator=draw, dtype=torch.float64)
    return x.requires_grad_(), torch.randn(3, 4, 4, generator=draw, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 0)])
def test_it_is_the_dense_product_and_so_are_its_gradients(lead: tuple[int, ...]) -> None:
    x, blocks = made(*lead)
    y, expected = blockwise(x, blocks), dense(x, blocks)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(expected, (x, blocks), dy)
    for found, own in zip(torch.autograd.grad(y, (x, blocks), dy), wanted, strict=True):
        torch.testing.assert_close(found, own)


def test_a_signal_in_strides_and_one_block_for_all() -> None:
    x, blocks = made(2, 5)
    x, one = x.detach().transpose(0, 1).requires_grad_(), blocks[:1].detach().requires_grad_()
    y, expected = blockwise(x, one.expand(3, -1, -1)), dense(x, one.expand(3, -1, -1))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), one), torch.autograd.grad(expected.square().sum(), one)
    )


def test_low_precision_signals_and_autocast_keep_theirs() -> None:
    x, blocks = made(6)
    low, single = x.detach().bfloat16().requires_grad_(), blocks.detach().float().requires_grad_()
    y = blockwise(low, single)
    assert y.dtype is torch.bfloat16
    y.float().square().sum().backward()
    assert single.grad is not None
    assert single.grad.dtype is torch.float32
    torch.testing.assert_close(y.double(), dense(x, blocks), rtol=0.05, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert blockwise(x.detach().float(), single).dtype is torch.bfloat16


def test_transforms_and_the_compiler_see_plain_operations() -> None:
    x, blocks = made(6)
    rows = torch.func.vmap(blockwise, in_dims=(0, None))(x.detach(), blocks.detach())
    torch.testing.assert_close(rows, dense(x, blocks).detach())


def test_the_signal_is_all_that_is_kept() -> None:
    x, blocks = made(6)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        blockwise(x, blocks)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), blocks.data_ptr()}
