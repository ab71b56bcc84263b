"""GaLore's projection, its step and its state, against the formulas written out in float64."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from walks import gradient, parameter, walk

from graftwork.errors import BadOption, StateError
from graftwork.optimizers.galore import GaLore
from graftwork.optimizers.memory import state_bytes
from graftwork.optimizers.projection import leading_basis, project, project_back

SHAPES = [(7, 4), (5, 5), (4, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_check_3_basis_is_orthonormal_and_of_the_shorter_side(shape: tuple[int, int], svd: str) -> None:
    p = parameter(*shape)
    optimizer = GaLore([{"params": [p], "rank": 2}], svd=svd)
    walk(optimizer, range(3))
    state = optimizer.state[p]
    assert state["projector"].shape == (min(shape), 2)
    torch.testing.assert_close(state["projector"].mT @ state["projector"], torch.eye(2, dtype=torch.float64))
    projected = (shape[0], 2) if shape[0] >= shape[1] else (2, shape[1])
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == projected


@pytest.mark.parametrize("shape", SHAPES)
def test_check_3_basis_spans_the_leading_singular_vectors(shape: tuple[int, int]) -> None:
    matrix = gradient(torch.empty(shape, dtype=torch.float64), 0)
    left, _, right = torch.linalg.svd(matrix)
    true = right[:2].mT if shape[0] >= shape[1] else left[:, :2]
    basis = leading_basis(matrix, 2, "exact", 0)
    torch.testing.assert_close(basis @ basis.mT, true @ true.mT)


def test_randomized_basis_finds_a_decaying_spectrum_and_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(60, 40, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))[0]
    matrix = left * 0.5 ** torch.arange(40) @ right.mT
    exact, found = leading_basis(matrix, 4, "exact", 3), leading_basis(matrix, 4, "randomized", 3)
    torch.testing.assert_close(found @ found.mT, exact @ exact.mT, atol=1e-6, rtol=0)
    assert torch.equal(found, leading_basis(matrix, 4, "randomized", 3))


@pytest.mark.parametrize("shape", SHAPES)
def test_check_4_a_step_lies_in_the_span(shape: tuple[int, int]) -> None:
    p = parameter(*shape)
    before = p.detach().clone()
    optimizer = GaLore([{"params": [p], "rank": 2}], lr=0.1)
    walk(optimizer, range(1))
    change, basis = p.detach() - before, optimizer.state[p]["projector"]
    assert change.norm() > 0.01
    inside = change @ basis @ basis.mT if shape[0] >= shape[1] else basis @ basis.mT @ change
    torch.testing.assert_close(inside, change, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_check_4_the_full_rank_projection_loses_nothing(shape: tuple[int, int]) -> None:
    matrix = gradient(torch.empty(shape, dtype=torch.float64), 1)
    basis = leading_basis(matrix, min(shape), "exact", 0)
    torch.testing.assert_close(project_back(project(matrix, basis), basis, matrix.shape), matrix)


def test_check_5_the_basis_is_renewed_at_0_T_2T_only() -> None:
    p = parameter(6, 4)
    optimizer = GaLore([{"params": [p], "rank": 2}], refresh_interval=3)
    renewed, last = [], None
    for step in range(8):
        walk(optimizer, range(step, step + 1))
        basis = optimizer.state[p]["projector"]
        if last is None or not torch.equal(basis, last):
            renewed.append(step)
        last = basis.clone()
    assert renewed == [0, 3, 6]


def test_moments_and_their_count_go_on_over_a_renewal() -> None:
    """Against the algorithm written out, with weight decay after the step, on the whole matrix (check 9)."""
    p, lr, scale, eps, decay, interval = parameter(4, 6), 0.05, 0.5, 1e-6, 0.1, 2
    weight, mean, square = p.detach().clone(), torch.zeros(3, 6).double(), torch.zeros(3, 6).double()
    optimizer = GaLore(
        [{"params": [p], "rank": 3}], lr, (0.8, 0.9), eps, decay, refresh_interval=interval, scale=scale
    )
    for step in range(5):
        g = gradient(p, 10 * step)
        if step % interval == 0:
            basis = torch.linalg.svd(g)[0][:, :3]
        low = basis.mT @ g
        mean, square = 0.8 * mean + 0.2 * low, 0.9 * square + 0.1 * low**2
        rate = lr * (1 - 0.9 ** (step + 1)) ** 0.5 / (1 - 0.8 ** (step + 1))
        weight = weight - rate * scale * basis @ (mean / (square.sqrt() + eps))
        weight = weight - lr * decay * weight
    walk(optimizer, range(5))
    torch.testing.assert_close(p.detach(), weight, atol=1e-12, rtol=0)


def test_check_8_the_first_step_moves_projected_coordinates_by_scale_times_lr() -> None:
    p = parameter(6, 4)
    before = p.detach().clone()
    optimizer = GaLore([{"params": [p], "rank": 2}], lr=0.01, scale=0.25, eps=0.0)
    walk(optimizer, range(1))
    moved = project(p.detach() - before, optimizer.state[p]["projector"]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.0025))


def test_toy_first_step() -> None:
    p = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    p.grad = torch.tensor([[3.0, 0, 0], [0, 1, 0]], dtype=torch.float64)
    optimizer = GaLore([{"params": [p], "rank": 1}], lr=0.01, scale=0.25, eps=1e-6)
    optimizer.step()
    assert optimizer.state[p]["projector"].abs().squeeze(1).tolist() == pytest.approx([1.0, 0.0])
    expected = torch.zeros(2, 3, dtype=torch.float64)
    expected[0, 0] = -0.00249997365
    torch.testing.assert_close(p.detach(), expected, atol=5e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_check_9_other_parameters_follow_plain_adamw(dtype: torch.dtype, decay: float) -> None:
    ours, theirs = parameter(9, dtype=dtype), parameter(9, dtype=dtype)
    mine = GaLore([{"params": [ours]}, {"params": [parameter(4, 4)], "rank": 2}], 0.01, weight_decay=decay)
    reference = torch.optim.AdamW([theirs], 0.01, eps=1e-6, weight_decay=decay)
    walk(mine, range(6))
    walk(reference, range(6))
    assert torch.equal(ours, theirs)


def test_check_10_a_restored_state_continues_the_trajectory() -> None:
    def fresh() -> tuple[list[nn.Parameter], GaLore]:
        ps = [parameter(6, 4, dtype=torch.bfloat16), parameter(5, dtype=torch.bfloat16)]
        return ps, GaLore([{"params": ps[:1], "rank": 2}, {"params": ps[1:]}], 0.05, refresh_interval=3)

    whole, uninterrupted = fresh()
    walk(uninterrupted, range(8))
    first, optimizer = fresh()
    walk(optimizer, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second, resumed = fresh()
    for old, new in zip(first, second):
        new.data.copy_(old.data)
    resumed.load_state_dict(torch.load(file))
    assert resumed.state[second[0]]["exp_avg"].dtype == torch.float32
    walk(resumed, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole, second))


def test_a_loaded_state_is_not_shared() -> None:
    p = parameter(6, 4)
    optimizer = GaLore([{"params": [p], "rank": 2}])
    walk(optimizer, range(2))
    other = GaLore([{"params": [q := parameter(6, 4)], "rank": 2}])
    other.load_state_dict(optimizer.state_dict())
    kept = copy.deepcopy(optimizer.state[p]["exp_avg"])
    walk(other, range(2, 4))
    assert not torch.equal(other.state[q]["exp_avg"], kept)
    assert torch.equal(optimizer.state[p]["exp_avg"], kept)


def test_check_11_bytes_are_counted_exactly() -> None:
    p, bias = parameter(40, 10, dtype=torch.float32), parameter(40, dtype=torch.float32)
    optimizer = GaLore([{"params": [p], "rank": 1}, {"params": [bias]}])
    assert state_bytes(optimizer) == {"total": 0}
    walk(optimizer, range(1))
    sizes = state_bytes(optimizer)
    moments = 4 * (1 * 40 + 40)
    assert sizes == {
        "projector": 4 * 1 * 10,
        "exp_avg": moments,
        "exp_avg_sq": moments,
        "step": 4,
        "total": 4 * 10 + 2 * moments + 4,
    }


def test_pure_bf16_weights_follow_the_fp32_ones() -> None:
    low, high = parameter(16, 8, dtype=torch.bfloat16), parameter(16, 8, dtype=torch.bfloat16)
    high.data = high.data.float()
    for p in (low, high):
        optimizer = GaLore([{"params": [p], "rank": 4}], lr=0.1)
        for step in range(10):
            p.grad = gradient(torch.empty(16, 8, dtype=torch.bfloat16), step).to(p.dtype)
            optimizer.step()
        assert optimizer.state[p]["projector"].dtype == torch.float32
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), high.data, atol=0.06, rtol=0.02)


def test_a_kernel_is_projected_as_a_matrix() -> None:
    flat, kernel = parameter(6, 18), nn.Parameter(parameter(6, 18).detach().view(6, 2, 3, 3).clone())
    for p in (flat, kernel):
        optimizer = GaLore([{"params": [p], "rank": 3}], lr=0.1)
        p.grad = gradient(flat, 0).view(p.shape)
        optimizer.step()
    torch.testing.assert_close(kernel.view(6, 18), flat)


def test_a_schedule_and_a_closure_work() -> None:
    p = parameter(6, 4)
    optimizer = GaLore([{"params": [p], "rank": 2}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    schedule.step()
    kept = p.detach().clone()
    assert optimizer.step(closure) < first
    assert torch.equal(p, kept)


@pytest.mark.parametrize(
    "group, text",
    [
        ({"rank": 5}, "rank=5 is above the shorter side 4 of a parameter"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2, "refresh_interval": 0}, "refresh_interval=0"),
        ({"rank": 2, "scale": 0.0}, "scale=0.0"),
        ({"rank": 2, "svd": "exakt"}, "Did you mean exact"),
        ({"rank": 2, "lr": -1.0}, "lr=-1.0"),
        ({"rank": 2, "betas": (0.9, 1.0)}, "betas"),
        ({"rank": 2, "refresh_intervall": 3}, "Did you mean refresh_interval"),
        ({}, "no low-rank parameter"),
    ],
)
def test_bad_options_are_refused(group: dict[str, object], text: str) -> None:
    with pytest.raises(BadOption, match=text):
        GaLore([{"params": [parameter(6, 4)], **group}])


def test_a_vector_cannot_be_projected_and_nothing_is_half_added() -> None:
    optimizer = GaLore([{"params": [parameter(6, 4)], "rank": 2}])
    with pytest.raises(BadOption, match="no real matrix"):
        optimizer.add_param_group({"params": [parameter(6)], "rank": 2})
    assert len(optimizer.param_groups) == 1


def test_a_gradient_that_is_not_finite_is_refused_at_a_renewal() -> None:
    p = parameter(6, 4)
    p.grad = torch.full_like(p, torch.nan)
    with pytest.raises(StateError, match="not finite"):
        GaLore([{"params": [p], "rank": 2}]).step()
