"""The checks and numbers of BA-LoRA (arXiv:2408.04556) that are about its losses."""

from __future__ import annotations

import math

import pytest
import torch
from made_contexts import STUDENT, TEACHER, on
from torch import Tensor

import graftwork as gw
from graftwork.errors import BadOption
from graftwork.objectives import Consistency, Diversity, Objectives, SpectralConcentration
from graftwork.objectives.base import factor
from graftwork.objectives.consistency import divergence
from graftwork.objectives.diversity import correlation, negative_entropy
from graftwork.objectives.spectral_concentration import frobenius_ratio, leading, nuclear_ratio
from graftwork.testing import tiny, tiny_batch

TERMS = [Consistency(weight=0.15, temperature=2), Diversity(weight=0.03), SpectralConcentration(weight=0.03)]


def attached(family: str = "bert-classification") -> tuple[torch.nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, batch = tiny(family), dict(tiny_batch(family))
    gw.attach(model, gw.LoRA(rank=2))
    shape = batch["input_ids"].shape
    labels = batch["input_ids"].clone() if "causal" in family else torch.arange(shape[0]) % 2
    return model, {**batch, "labels": labels}


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """Adapters off their neutral start."""
    for parameter in gw.adapters(model)["default"].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_check_2_at_step_0_consistency_and_its_gradient_are_0() -> None:
    model, batch = attached()
    objectives = Objectives(model, [Consistency(weight=1.0, temperature=2)])
    outputs = model(**batch)
    total = objectives(outputs, batch, progress=0)
    assert total.parts["consistency"].item() == pytest.approx(0, abs=1e-9)
    parameters = list(gw.adapters(model)["default"].parameters())
    found = torch.autograd.grad(total.loss - outputs.loss, parameters)
    assert all(gradient.abs().max() < 1e-6 for gradient in found)


def test_check_2_the_first_update_is_that_without_the_term() -> None:
    updates = []
    for terms in ([], [Consistency(weight=0.15, temperature=2)]):
        model, batch = attached()
        parameters = list(gw.adapters(model)["default"].parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        Objectives(model, terms)(model(**batch), batch, progress=0).loss.backward()
        optimizer.step()
        updates.append([p.detach().clone() for p in parameters])
    for plain, regularised in zip(*updates, strict=True):
        torch.testing.assert_close(plain, regularised, atol=1e-7, rtol=1e-6)


def test_check_3_weights_of_0_leave_the_task_loss_bit_for_bit_and_the_teacher_asleep() -> None:
    model, batch = attached()
    stirred(model)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    outputs = model(**batch)
    off = [Consistency(weight=0), Diversity(weight=0), SpectralConcentration(weight=0)]
    total = Objectives(model, off)(outputs, batch, progress=0.5)
    assert total.loss is outputs.loss
    assert list(total.parts) == ["task"]
    assert len(calls) == 1
    Objectives(model, [Diversity(weight=1)])(outputs, batch, progress=0.5)
    assert len(calls) == 1  # reads no teacher
    Objectives(model, [Consistency(weight=1)])(outputs, batch, progress=0.5)
    assert len(calls) == 2


def test_check_4_only_the_adapter_learns_and_the_teacher_stays() -> None:
    model, batch = attached()
    stirred(model)
    own = {id(p) for p in gw.adapters(model)["default"].parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in own}
    with gw.active(model), torch.no_grad():
        taught = model(**batch).logits
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    objectives = Objectives(model, TERMS)
    for step in range(3):
        optimizer.zero_grad()
        objectives(model(**batch), batch, progress=step / 3).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if id(parameter) not in own:
            assert parameter.grad is None
            assert torch.equal(parameter, before[name])
    with gw.active(model), torch.no_grad():
        assert torch.equal(model(**batch).logits, taught)


def test_check_5_diversity_ignores_a_constant_row_and_is_0_without_correlation() -> None:
    torch.manual_seed(0)
    rows = torch.randn(6, 4, dtype=torch.float64)
    moved = correlation(rows + torch.randn(4, dtype=torch.float64))
    torch.testing.assert_close(correlation(rows), moved)
    apart = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert correlation(apart).item() == 0


@pytest.mark.parametrize("ratio", [nuclear_ratio, frobenius_ratio])
def test_check_6_rank_1_logits_give_minus_1(ratio) -> None:
    rows = torch.outer(torch.tensor([1.0, -2, 3]), torch.tensor([2.0, 1, 0, 5])).double()
    assert ratio(rows, 1).item() == pytest.approx(-1, abs=1e-12)


def test_check_6_identity() -> None:
    assert nuclear_ratio(torch.eye(4), 2).item() == -0.5
    assert frobenius_ratio(torch.eye(4), 2).item() == pytest.approx(-1.0)


def test_check_7_randomised_and_exact_agree() -> None:
    """On a low-rank matrix, value and gradient."""
    torch.manual_seed(0)
    low = (torch.randn(40, 6) @ torch.randn(6, 500)).double()
    found = []
    for widest in (4096, 100):
        rows = low.clone().requires_grad_()
        value = frobenius_ratio(rows, 4, widest)
        found.append((value.item(), torch.autograd.grad(value, rows)[0]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-3)


def test_check_7_a_noisy_wide_matrix() -> None:
    torch.manual_seed(0)
    rows = torch.randn(60, 3) @ torch.randn(3, 5000) + 0.1 * torch.randn(60, 5000)
    state = torch.get_rng_state()
    estimated = leading(rows, 8)[:3]
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(estimated, torch.linalg.svdvals(rows)[:3], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "term",
    [
        Consistency(weight=1, temperature=2),
        Diversity(weight=1, largest=3),
        Diversity(weight=1, form="covariance"),
        SpectralConcentration(weight=1, components=2),
        SpectralConcentration(weight=1, components=2, norm="nuclear"),
    ],
    ids=str,
)
@pytest.mark.parametrize("shifted", [False, True])
def test_check_8_masked_positions_have_no_gradient(term, shifted: bool) -> None:
    torch.manual_seed(0)
    student = torch.randn(2, 6, 7, requires_grad=True)
    labels = torch.tensor([[-100, -100, 3, 4, -100, -100], [-100, 1, 2, 3, 4, 5]])
    context = on(student, torch.randn(2, 6, 7), labels, shifted=shifted)
    (gradient,) = torch.autograd.grad(term(context), student)
    counts = labels != -100
    if shifted:  # position t counts when the label at t + 1 does
        counts = torch.cat([counts[:, 1:], torch.zeros(2, 1, dtype=torch.bool)], dim=1)
    assert torch.equal(gradient.abs().sum(-1) > 0, counts)


def test_check_9_entropy_ignores_logits_outside_the_largest() -> None:
    rows = torch.tensor([[4.0, 2, 1, 0, -1], [0.5, 0.4, 0.3, 0.2, 0.1]])
    moved = rows.clone()
    moved[:, 3:] -= torch.tensor([0.05, 7.0])
    assert torch.equal(negative_entropy(rows, 3), negative_entropy(moved, 3))
    assert not torch.equal(negative_entropy(rows), negative_entropy(moved))


def test_toy_consistency() -> None:
    rows = [divergence(s[None], t[None], 2).item() / 4 for s, t in zip(STUDENT, TEACHER, strict=True)]
    assert rows == pytest.approx([0.257403, 0.026345, 0.433781], abs=1e-6)
    assert Consistency(weight=1, temperature=2)(on(STUDENT, TEACHER)).item() == pytest.approx(
        0.956705, abs=1e-6
    )
    assert Consistency(weight=1)(on(STUDENT, TEACHER)).item() == pytest.approx(0.740286, abs=1e-6)


def test_toy_diversity() -> None:
    assert Diversity(weight=1)(on(STUDENT)).item() == pytest.approx(49)


def test_toy_spectrum() -> None:
    values = torch.linalg.svdvals(STUDENT).tolist()
    assert values == pytest.approx([11.644818, 0.631051], abs=1e-6)
    term = SpectralConcentration(weight=1)
    assert term(on(STUDENT)).item() == pytest.approx(-0.948594, abs=1e-6)
    frobenius = SpectralConcentration(weight=1, norm="frobenius")
    assert frobenius(on(STUDENT)).item() == pytest.approx(-0.998535, abs=1e-6)


def test_toy_total_of_the_three() -> None:
    total = sum(term.weight * term(on(STUDENT, TEACHER)).item() for term in TERMS)
    assert total == pytest.approx(1.585048, abs=1e-6)


def test_toy_generation() -> None:
    rows = torch.tensor([[4.0, 2, 1, 0, -1], [0, 0, 0, 0, 0]], dtype=torch.float64)
    entropies = [-negative_entropy(row[None], 3).item() for row in rows]
    assert entropies == pytest.approx([0.524267, math.log(3)], abs=1e-6)
    tokens = on(rows[None])  # one sequence of two tokens
    assert Diversity(weight=1, largest=3)(tokens).item() == pytest.approx(-0.811439, abs=1e-6)
    assert SpectralConcentration(weight=1)(tokens).item() == pytest.approx(-1)


def test_toy_cosine_schedule() -> None:
    term = Consistency(weight=0.025, schedule="cosine")
    found = [term.weight_at(step / 100) for step in (0, 25, 50, 75, 100)]
    assert found == pytest.approx([0.025, 0.021705, 0.01375, 0.005795, 0.0025], abs=1e-6)


def test_toy_two_phase_schedule() -> None:
    found = [factor("two-phase", step / 100) for step in (19, 20, 22, 24, 25, 100)]
    assert found == pytest.approx([0, 0, 0.4, 0.8, 1, 1])
    assert found[1] == 0


def test_value_ranges() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        rows, classes = (int(n) for n in torch.randint(3, 9, (2,)))
        logits = torch.randn(rows, classes)
        few = min(rows, classes)
        assert -1 <= nuclear_ratio(logits, 2).item() <= -2 / few + 1e-6
        assert -math.sqrt(2) <= frobenius_ratio(logits, 2).item() < 0
        assert -math.log(3) - 1e-6 <= negative_entropy(logits, 3).item() <= 0


@pytest.mark.parametrize("rows", [torch.zeros(0, 4), torch.ones(1, 4), torch.zeros(3, 4)])
def test_too_few_or_empty_rows_add_nothing(rows: Tensor) -> None:
    assert nuclear_ratio(rows, 1).item() == 0
    assert frobenius_ratio(rows, 1).item() == 0
    assert correlation(rows).item() == 0
    assert divergence(rows, rows).item() == 0


def test_a_nuclear_ratio_of_all_classes_is_refused_as_constant() -> None:
    """The published k = 5 is that on every task of two or three classes."""
    with pytest.raises(BadOption, match="constant; take at most 1"):
        SpectralConcentration(weight=1, components=5)(on(STUDENT))
