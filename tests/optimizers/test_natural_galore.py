"""Natural GaLore's Fisher step against dense and Woodbury solves, its limits, its history."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from walks import gradient, parameter, walk

from graftwork.errors import BadOption
from graftwork.optimizers.fisher import Ring
from graftwork.optimizers.galore import GaLore
from graftwork.optimizers.memory import state_bytes
from graftwork.optimizers.natural_galore import NaturalGaLore


def ring(*vectors: Tensor, size: int = 20) -> Ring:
    held = Ring.empty(size, vectors[0])
    for vector in vectors:
        held.append(vector)
    return held


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(number: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    return list(torch.randn(number, width, generator=generator, dtype=torch.float64))


def trajectories(dtype: torch.dtype, **natural: float) -> tuple[Tensor, Tensor]:
    """Weights after GaLore and after Natural GaLore, on the same gradients."""
    plain, own = parameter(7, 4, dtype=dtype), parameter(7, 4, dtype=dtype)
    walk(GaLore([{"params": [plain], "rank": 2}], 0.05, eps=0.0, refresh_interval=4), range(10))
    walk(
        NaturalGaLore([{"params": [own], "rank": 2}], 0.05, eps=0.0, refresh_interval=4, **natural), range(10)
    )
    return plain.detach(), own.detach()


@pytest.mark.parametrize("damping", [1e-3, 0.5, 100.0])
@pytest.mark.parametrize("appended", [1, 4, 9])
def test_check_1_the_dual_form_equals_dense_and_woodbury(damping: float, appended: int) -> None:
    vectors = random(appended, 30)
    found = ring(*vectors, size=5).natural(damping)
    columns, newest = torch.stack(vectors[-5:], 1), vectors[-1]
    dense = torch.linalg.solve(damping * torch.eye(30) + columns @ columns.mT, newest)
    torch.testing.assert_close(found, dense, atol=1e-10, rtol=0)
    small = torch.eye(columns.shape[1]) + columns.mT @ columns / damping
    inner = torch.linalg.solve(small, columns.mT @ newest)
    woodbury = newest / damping - columns @ inner / damping**2
    torch.testing.assert_close(found, woodbury, atol=1e-10 * max(1, 1e-3 / damping**2), rtol=1e-10)


def test_check_1_holds_in_fp32_where_woodbury_loses_digits() -> None:
    vectors = [v.float() * 30 for v in random(20, 400)]
    columns = torch.stack(vectors, 1).double()
    dense = torch.linalg.solve(1e-3 * torch.eye(400) + columns @ columns.mT, columns[:, -1])
    found = ring(*vectors).natural(1e-3).double()
    assert (found - dense).norm() / dense.norm() < 1e-6


def test_check_2_a_huge_damping_is_galore() -> None:
    plain, own = trajectories(torch.float64, damping=1e9)
    torch.testing.assert_close(own, plain, atol=1e-6, rtol=0)


def test_check_2_the_natural_step_changes_the_trajectory() -> None:
    plain, own = trajectories(torch.float64, damping=1e-3)
    assert (own - plain).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_2_without_the_natural_step_it_is_galore_bit_by_bit(dtype: torch.dtype) -> None:
    plain, own = trajectories(dtype, history=0)
    assert torch.equal(own, plain)


def test_check_6_a_single_entry_only_rescales() -> None:
    (g,) = random(1, 30)
    for damping in (1e-3, 2.0):
        torch.testing.assert_close(ring(g).natural(damping), g / (damping + g @ g))


def test_check_6_the_same_gradient_repeated() -> None:
    (g,) = random(1, 30)
    torch.testing.assert_close(ring(g, g, g, g).natural(0.7), g / (0.7 + 4 * (g @ g)))


def test_check_6_an_orthogonal_history_changes_no_direction() -> None:
    columns = torch.linalg.qr(torch.stack(random(5, 30), 1))[0] * vector(3, 1, 2, 5, 4)
    g = columns[:, -1]
    torch.testing.assert_close(ring(*columns.mT).natural(0.5), g / (0.5 + g @ g))


def test_check_6_without_damping_older_gradients_are_removed() -> None:
    vectors = random(6, 30)
    found = ring(*vectors).natural(1e-12)
    products = torch.stack([found @ v for v in vectors])
    torch.testing.assert_close(products, vector(0, 0, 0, 0, 0, 1), atol=1e-10, rtol=0)


def test_check_7_the_history_is_bounded_and_drops_the_oldest() -> None:
    p = parameter(6, 4)
    optimizer = NaturalGaLore([{"params": [p], "rank": 2}], history=3, refresh_interval=100)
    lows = []
    for step in range(7):
        walk(optimizer, range(step, step + 1))
        state = optimizer.state[p]
        lows.append((gradient(p, 10 * step) @ state["projector"]).flatten())
        held = Ring(state["history"], state["history_gram"], state["history_count"])
        assert held.length == min(step + 1, 3)
        assert held.rows.shape == (3, 12)
        torch.testing.assert_close(held.rows[held.newest], lows[-1])
        kept = {tuple(row.tolist()) for row in held.rows[: held.length]}
        assert kept == {tuple(row.tolist()) for row in lows[-3:]}
        torch.testing.assert_close(
            held.gram[: held.length, : held.length], (rows := held.rows[: held.length]) @ rows.mT
        )


@pytest.mark.parametrize("clear, lengths", [(False, [1, 2, 3, 4, 5, 5, 5]), (True, [1, 2, 3, 1, 2, 3, 1])])
def test_check_7_the_history_is_cleared_at_a_renewal_where_asked(clear: bool, lengths: list[int]) -> None:
    p = parameter(6, 4)
    optimizer = NaturalGaLore(
        [{"params": [p], "rank": 2}], history=5, refresh_interval=3, clear_history=clear
    )
    found = []
    for step in range(7):
        walk(optimizer, range(step, step + 1))
        found.append(min(optimizer.state[p]["history_count"], 5))
    assert found == lengths


def test_after_clearing_only_the_new_entries_count() -> None:
    vectors = random(8, 30)
    held = ring(*vectors[:6], size=4)
    held.clear()
    for v in vectors[6:]:
        held.append(v)
    torch.testing.assert_close(held.natural(0.1), ring(*vectors[6:]).natural(0.1))


def test_check_10_a_restored_state_continues_the_trajectory() -> None:
    def fresh() -> tuple[nn.Parameter, NaturalGaLore]:
        p = parameter(6, 4, dtype=torch.bfloat16)
        return p, NaturalGaLore([{"params": [p], "rank": 2}], 0.05, refresh_interval=3, history=4)

    whole, uninterrupted = fresh()
    walk(uninterrupted, range(11))
    first, optimizer = fresh()
    walk(optimizer, range(7))
    second, resumed = fresh()
    second.data.copy_(first.data)
    resumed.load_state_dict(optimizer.state_dict())
    walk(resumed, range(7, 11))
    assert torch.equal(whole, second)
    assert resumed.state[second]["history"].dtype == torch.float32
    assert resumed.state[second]["history_gram"].dtype == torch.float64


def test_check_11_the_history_is_counted_and_may_exceed_full_adamw() -> None:
    n, rank, size = 32, 8, 20
    p, full = parameter(n, n, dtype=torch.float32), parameter(n, n, dtype=torch.float32)
    optimizer, adamw = NaturalGaLore([{"params": [p], "rank": rank}], history=size), torch.optim.AdamW([full])
    walk(optimizer, range(1))
    walk(adamw, range(1))
    sizes = state_bytes(optimizer)
    numbers = rank * n + 2 * rank * n + size * rank * n
    assert sizes["total"] == 4 * numbers + 8 * size**2
    assert (sizes["history"], sizes["history_gram"]) == (4 * size * rank * n, 8 * size**2)
    assert sizes["total"] > state_bytes(adamw)["total"] == 4 * (2 * n * n + 1)


@pytest.mark.parametrize(
    "history, damping, expected",
    [
        ([(1, 0), (1, 1)], 0.5, (0.181818, 0.545455)),
        ([(1, 0), (1, 1)], 1e-3, (0.000997, 0.998005)),
        ([(1, 1)], 0.5, (0.4, 0.4)),
        ([(1, 1), (1, 1), (1, 1)], 0.5, (0.153846, 0.153846)),
        ([(1, -1), (1, 1)], 0.5, (0.4, 0.4)),
    ],
)
def test_toy_fisher(
    history: list[tuple[float, float]], damping: float, expected: tuple[float, float]
) -> None:
    found = ring(*(vector(*g) for g in history)).natural(damping)
    assert found.tolist() == pytest.approx(expected, abs=6e-7)


def test_toy_fisher_with_a_large_damping() -> None:
    found = 1e6 * ring(vector(1, 0), vector(1, 1)).natural(1e6)
    assert found.tolist() == pytest.approx((0.999997, 0.999998), abs=6e-7)


def test_toy_first_step() -> None:
    p = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    p.grad = torch.tensor([[3.0, 0, 0], [0, 1, 0]], dtype=torch.float64)
    optimizer = NaturalGaLore([{"params": [p], "rank": 1}], lr=0.01, scale=0.25, eps=1e-6, damping=1e-3)
    optimizer.step()
    fed = optimizer.state[p]["exp_avg"] / (1 - 0.9)
    assert fed.abs().squeeze(0).tolist() == pytest.approx([0.333296, 0, 0], abs=6e-7)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    expected[0, 0] = -0.00249976283
    torch.testing.assert_close(p.detach(), expected, atol=5e-12, rtol=0)


@pytest.mark.parametrize(
    "natural, expected",
    [
        (None, (0.932180, 0.744137, 0.670058)),
        (1.0, (0.909087, 0.744137, 0.024221)),
        (1e-3, (0.904803, 0.744137, -0.293153)),
    ],
)
def test_toy_two_steps(natural: float | None, expected: tuple[float, float, float]) -> None:
    p = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    groups, own = [{"params": [p], "rank": 1}], {"lr": 1.0, "scale": 1.0, "eps": 1e-30}
    optimizer = GaLore(groups, **own) if natural is None else NaturalGaLore(groups, damping=natural, **own)
    for low in ([2.0, 0, 1], [1.0, 1, 0]):
        before = p.detach().clone()
        p.grad = torch.tensor([low, [0, 0, 0]], dtype=torch.float64)
        optimizer.step()
    assert (before - p.detach())[0].tolist() == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize(
    "options, text", [({"damping": 0.0}, "damping=0.0"), ({"history": -1}, "history=-1")]
)
def test_bad_options_are_refused(options: dict[str, float], text: str) -> None:
    with pytest.raises(BadOption, match=text):
        NaturalGaLore([{"params": [parameter(6, 4)], "rank": 2}], **options)


@pytest.mark.parametrize("option", ["rank", "history"])
def test_an_option_that_shapes_the_state_cannot_change(option: str) -> None:
    p = parameter(6, 4)
    optimizer = NaturalGaLore([{"params": [p], "rank": 2}], history=3)
    walk(optimizer, range(2))
    before = p.detach().clone()
    optimizer.param_groups[0][option] += 1
    with pytest.raises(BadOption, match=f"started with {option}="):
        walk(optimizer, range(2, 3))
    assert torch.equal(p, before)
