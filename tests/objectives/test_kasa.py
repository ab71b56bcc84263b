"""The checks and numbers of KaSA (arXiv:2412.06071) that are about its penalties."""

from __future__ import annotations

import math

import pytest
import torch
from made_contexts import Factors, of
from torch import Tensor

import graftwork as gw
from graftwork.errors import NothingMatches
from graftwork.objectives import Objectives, Orthogonality, SingularValues
from graftwork.objectives.orthogonality import departure, departure_official
from graftwork.testing import tiny, tiny_batch

PAPER, OFFICIAL = Orthogonality(weight=1), Orthogonality(weight=1, official=True)
UP = torch.tensor([[1.0, 0], [1, 1], [0, 2]], dtype=torch.float64)
DOWN = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0]], dtype=torch.float64)


def by_hand(factor: Tensor) -> float:
    """The N x N form, written out."""
    return torch.linalg.matrix_norm(factor @ factor.mT - torch.eye(len(factor)).to(factor)).item()


def test_check_7_at_zero_up_the_part_is_sqrt_r_and_its_gradient_0() -> None:
    up = torch.zeros(5, 3, requires_grad=True)
    value = departure(up)
    value.backward()
    assert value.item() == pytest.approx(math.sqrt(3))
    assert torch.equal(up.grad, torch.zeros_like(up))


@pytest.mark.parametrize("official", [False, True])
def test_check_7_orthonormal_factors(official: bool) -> None:
    """0 in the paper's form and sqrt(m - r) + sqrt(n - r) in the code's, without a NaN in the gradient."""
    n, m, r = 7, 5, 3
    up, down = torch.eye(n)[:, :r], torch.eye(m)[:r]
    module = Factors(up, down)
    value = Orthogonality(weight=1, official=official)(of(module))
    expected = math.sqrt(m - r) + math.sqrt(n - r) if official else 0.0
    assert value.item() == pytest.approx(expected, abs=1e-6)
    value.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())


def test_check_10_one_step_of_l2_alone() -> None:
    rate, beta = 0.1, 0.3
    values = torch.randn(4, dtype=torch.float64)
    for averaged in (False, True):
        modules = [Factors(UP, DOWN, values.clone()) for _ in range(3)]
        optimizer = torch.optim.SGD([m.values for m in modules], lr=rate)
        (beta * SingularValues(weight=beta, averaged=averaged)(of(*modules))).backward()
        optimizer.step()
        share = beta / 3 if averaged else beta
        for module in modules:
            torch.testing.assert_close(module.values.detach(), (1 - 2 * rate * share) * values)


def test_toy_l2_and_l3_of_unit_factors() -> None:
    module = Factors(
        torch.tensor([[0.0], [0], [1]]), torch.tensor([[1.0, 0, 0]]), torch.tensor([0.5])
    ).double()
    assert SingularValues(weight=1)(of(module)).item() == 0.25
    assert PAPER(of(module)).item() == 0
    assert OFFICIAL(of(module)).item() == pytest.approx(2.828427, abs=1e-6)


def test_toy_parts_of_l3() -> None:
    assert departure(UP).item() == pytest.approx(4.358899, abs=1e-6)
    assert departure(DOWN.mT).item() == pytest.approx(1.0)
    assert departure_official(UP).item() == pytest.approx(4.472136, abs=1e-6)
    assert departure_official(DOWN.mT).item() == pytest.approx(1.732051, abs=1e-6)
    assert PAPER(of(Factors(UP, DOWN))).item() == pytest.approx(5.358899, abs=1e-6)


@pytest.mark.parametrize("shape", [(6, 2), (4, 4), (2, 5)])
def test_the_official_form_is_that_of_the_large_gram(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    factor = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    assert departure_official(factor).item() == pytest.approx(by_hand(factor.detach()))
    assert torch.autograd.gradcheck(departure_official, (factor,))


def test_averages_divide_by_the_matrices_of_experts_too() -> None:
    torch.manual_seed(0)
    stack = Factors(torch.randn(4, 6, 2), torch.randn(4, 2, 5), torch.randn(4, 2))
    singles = [
        Factors(*parts) for parts in zip(stack.up.data, stack.down.data, stack.values.data, strict=True)
    ]
    for kind in (Orthogonality, SingularValues):
        whole, mean = kind(weight=1), kind(weight=1, averaged=True)
        torch.testing.assert_close(whole(of(stack)), whole(of(*singles)))
        torch.testing.assert_close(mean(of(stack)), whole(of(stack)) / 4)
        torch.testing.assert_close(mean(of(*singles)), mean(of(stack)))


def test_frozen_factors_do_not_count() -> None:
    module = Factors(UP, DOWN, torch.ones(2))
    module.requires_grad_(False)
    for term in (PAPER, SingularValues(weight=1)):
        with pytest.raises(NothingMatches, match="Factors"):
            term(of(module))


def test_on_an_attached_model_l3_is_the_sum_over_its_matrices() -> None:
    model, batch = tiny("llama"), dict(tiny_batch("llama"))
    adapter = gw.attach(model, gw.LoRA(rank=2))
    batch["labels"] = batch["input_ids"]
    outputs = model(**batch)
    total = Objectives(model, [Orthogonality(weight=0.5)])(outputs, batch, progress=0)
    expected = sum(
        (torch.linalg.matrix_norm(m.up.mT @ m.up - torch.eye(2)) for m in adapter.modules.values()),
        torch.zeros(()),
    ) + sum(torch.linalg.matrix_norm(m.down @ m.down.mT - torch.eye(2)) for m in adapter.modules.values())
    torch.testing.assert_close(total.parts["orthogonality"], expected.detach())
    torch.testing.assert_close(total.loss, outputs.loss + 0.5 * expected)


def test_l2_on_a_technique_without_singular_values_is_refused() -> None:
    model, batch = tiny("llama"), dict(tiny_batch("llama"))
    gw.attach(model, gw.LoRA(rank=2))
    batch["labels"] = batch["input_ids"]
    with pytest.raises(NothingMatches, match=r"singular-values found no .*LowRank.*kasa"):
        Objectives(model, [SingularValues(weight=1)])(model(**batch), batch, progress=0)
