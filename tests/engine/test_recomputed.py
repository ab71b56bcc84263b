"""A function whose intermediate results are made again in backward."""

from __future__ import annotations

import torch
from torch import Tensor

from graftwork.engine.recomputed import recomputed


def mixed(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(x @ a) @ b


def test_answer_and_gradients_are_those_of_the_function() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (4, 8), (8, 2))]
    assert torch.autograd.gradcheck(lambda *t: recomputed(mixed, *t), tensors)
    tensors[1].requires_grad_(False)
    recomputed(mixed, *tensors).sum().backward()
    assert tensors[1].grad is None
    assert tensors[2].grad is not None


def test_only_the_inputs_are_kept() -> None:
    x, a, b = torch.randn(64, 4), torch.randn(4, 512, requires_grad=True), torch.randn(512, 2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        recomputed(mixed, x, a, b)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, a, b)}


def test_backward_runs_in_the_precision_of_the_forward() -> None:
    x, a, b = torch.randn(5, 4), torch.randn(4, 6, requires_grad=True), torch.randn(6, 2)
    gradients = []
    for function in (mixed, lambda *t: recomputed(mixed, *t)):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x, a, b)
        assert y.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(y.sum(), a)[0])
    assert torch.equal(*gradients)
