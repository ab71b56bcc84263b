"""Techniques that add a matrix: each delta against its paper's formula in float64, and the cheaper ways against it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import handmade as by_hand
import peft
import pytest
import torch
from torch import Tensor, nn

from graftwork.engine.lowrank import low_rank_linear
from graftwork.engine.modules import DeltaModule, LowRankModule
from graftwork.errors import BadOption
from graftwork.reference.site import Kind, Site
from graftwork.reference.technique import Technique
from graftwork.techniques.fourierft import FourierFT
from graftwork.techniques.loha import LoHa
from graftwork.techniques.lokr import LoKr, divided
from graftwork.techniques.miss import MiSS
from graftwork.techniques.randlora import RandLoRA
from graftwork.techniques.shira import SHiRA
from graftwork.techniques.vera import VeRA

SQUARE = by_hand.linear("attention.query", 24, 24)
WIDENS = by_hand.linear("feedforward.up", 36, 24)
NARROWS = by_hand.linear("feedforward.down", 24, 36)
SHAPES = [SQUARE, WIDENS, NARROWS]
CASES: dict[str, Technique] = {
    "loha-thin": LoHa(rank=2, alpha=3),
    "loha": LoHa(rank=5, alpha=3),
    "lokr": LoKr(rank=2, alpha=3),
    "lokr-whole": LoKr(rank=9, alpha=3),
    "lokr-factor": LoKr(rank=1, factor=3),
    "vera": VeRA(rank=7),
    "miss": MiSS(rank=4),
    "miss-padded": MiSS(rank=7),
    "shira": SHiRA(rank=3),
    "fourierft": FourierFT(count=30, alpha=2.0),
    "randlora": RandLoRA(rank=6, alpha=12),
    "randlora-uneven": RandLoRA(rank=7, alpha=7),
}
ANSWERING = [name for name in CASES if name.startswith(("lokr", "vera"))]


def made(technique: Technique, site: Site) -> Any:
    return by_hand.jittered(by_hand.build_one(technique, site))


def signal(*shape: int) -> Tensor:
    return by_hand.values(*shape, seed=3).double()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def filled(module: Any, **values: list[Any]) -> Any:
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name.replace("__", ".")).copy_(torch.tensor(value))
    return module


# --- what the cheaper ways must equal


@pytest.mark.parametrize("site", SHAPES, ids=lambda s: s.workspace)
@pytest.mark.parametrize("name", ANSWERING)
def test_added_is_the_product_with_the_delta(name: str, site: Site) -> None:
    module = made(CASES[name], site)
    for shape in [(site.width_in,), (5, site.width_in), (2, 3, site.width_in)]:
        close(module.added(signal(*shape)), signal(*shape) @ module.delta().mT)


@pytest.mark.parametrize("site", SHAPES, ids=lambda s: s.workspace)
@pytest.mark.parametrize("name", ANSWERING)
def test_added_has_the_gradients_of_the_delta(name: str, site: Site) -> None:
    module = made(CASES[name], site)
    x = signal(2, 3, site.width_in).requires_grad_()
    tensors = [x, *module.parameters()]
    wanted = torch.autograd.grad((x @ module.delta().mT).square().sum(), tensors)
    found = torch.autograd.grad(module.added(x).square().sum(), tensors)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


@pytest.mark.parametrize("name", ANSWERING)
def test_added_answers_in_the_precision_of_the_signal(name: str) -> None:
    module = by_hand.build_one(CASES[name], WIDENS)
    assert module.added(signal(2, 24).bfloat16()).dtype is torch.bfloat16  # type: ignore[operator]


@pytest.mark.parametrize("name", ["loha-thin", "vera"])
def test_factors_make_the_delta(name: str) -> None:
    module = made(CASES[name], WIDENS)
    assert isinstance(module, LowRankModule)
    down, up = module.factors()
    close(module.scale * up @ down, module.delta())


def test_loha_runs_by_factors_only_where_they_are_smaller_than_the_matrix() -> None:
    assert isinstance(LoHa(rank=3).build(SQUARE), LowRankModule)  # 9 (24 + 24) < 24 * 24
    assert not isinstance(LoHa(rank=4).build(SQUARE), LowRankModule)


@pytest.mark.parametrize("technique", CASES.values(), ids=CASES)
def test_fused_expert_weights_are_changed_one_by_one(technique: Technique) -> None:
    site = dataclasses.replace(by_hand.EXPERTS, width_in=36, width_out=24)
    module = made(technique, site)
    deltas = module.delta()
    assert deltas.shape == (3, 24, 36)
    alone = made(technique, NARROWS)
    with torch.no_grad():
        for own, whole in zip(alone.parameters(), module.parameters(), strict=True):
            own.copy_(whole[1])
    close(deltas[1], alone.delta())


# --- formulas and toy values


def test_loha_multiplies_two_products_element_by_element() -> None:
    for rank in (2, 5):
        module = made(LoHa(rank=rank, alpha=3), WIDENS)
        first = torch.einsum("or,ri->oi", module.up1, module.down1)
        second = torch.einsum("or,ri->oi", module.up2, module.down2)
        close(module.delta(), 3 / rank * first * second)


def test_lokr_toy_value_and_split() -> None:
    module = LoKr(rank=1, factor=1).build(by_hand.linear("attention.query", 2, 4))
    assert [tuple(p.shape) for p in module.parameters()] == [(1, 1), (2, 1), (1, 4)]
    module = LoKr(rank=8).build(by_hand.linear("attention.query", 2, 4))
    filled(module, left=[[1.0, 2.0]], right__0=[[0.0, 1.0], [1.0, 0.0]])
    assert module.delta().tolist() == [[0, 1, 0, 2], [1, 0, 2, 0]]  # type: ignore[operator]
    assert [divided(n, None) for n in (256, 128, 127, 6)] == [(16, 16), (8, 16), (1, 127), (2, 3)]
    assert [divided(128, factor) for factor in (4, 5, 3)] == [(4, 32), (4, 32), (2, 64)]


def test_lokr_is_a_kronecker_product() -> None:
    for rank in (2, 9):
        module = made(LoKr(rank=rank, alpha=3), WIDENS)
        right = math.prod([1.0]) * torch.linalg.multi_dot(
            [*module.right, torch.eye(module.right[-1].shape[1]).double()]
        )
        close(module.delta(), 3 / rank * torch.kron(module.left, right))


def test_vera_scales_two_frozen_matrices() -> None:
    technique = VeRA(rank=7)
    narrow, wide = by_hand.build(technique, [NARROWS, WIDENS])
    assert narrow.shared is wide.shared
    down, up = narrow.shared["down"].double(), narrow.shared["up"].double()
    assert (down.shape, up.shape) == ((7, 36), (36, 7))
    module = by_hand.jittered(wide)
    expected = torch.diag(module.outer) @ up @ torch.diag(module.inner) @ down[:, :24]
    close(module.delta(), expected)
    assert down.abs().max() <= math.sqrt(6 / 36)
    assert up.abs().max() <= math.sqrt(6 / 7)


def test_miss_toy_value() -> None:
    module = filled(by_hand.build_one(MiSS(rank=1), by_hand.linear("q", 2, 4)), block=[[1.0, 2.0]])
    assert (torch.tensor([1.0, 2.0, 3.0, 4.0]) @ module.delta().mT).tolist() == [10, 20]


def test_miss_repeats_its_rows_along_the_input() -> None:
    module = made(MiSS(rank=7), WIDENS)
    delta = module.delta()
    for column in range(24):
        close(delta[:, column], module.block[column % 7])


def test_miss_keeps_its_sums_and_not_the_input() -> None:
    module = by_hand.build_one(MiSS(rank=4), WIDENS)
    x = torch.randn(50, 24, requires_grad=True)
    down, up = module.factors()  # type: ignore[operator]
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t
    ):
        low_rank_linear(x, None, None, down, up, 1.0)
    assert x.data_ptr() not in kept
    assert sorted(kept.values()) == [4 * 24, 4 * 36, 50 * 4]  # both factors, and the sums


def test_shira_trains_scattered_values_only() -> None:
    module = made(SHiRA(rank=3), WIDENS)
    places = module.shared["36x24"]
    assert len(places) == len(set(places.tolist())) == 3 * (36 + 24)
    delta = module.delta().flatten()
    close(delta[places], module.values)
    assert int((delta != 0).sum()) == len(places)


def test_fourierft_toy_value() -> None:
    module = FourierFT(count=1, alpha=1.0).build(by_hand.linear("q", 2, 2))
    module.shared = {"of4": torch.tensor([1])}  # type: ignore[assignment]
    filled(module, coefficients=[1.0])
    assert module.delta().tolist() == [[0.25, -0.25], [0.25, -0.25]]  # type: ignore[operator]


def test_fourierft_is_a_sum_of_waves() -> None:
    module = made(FourierFT(count=5, alpha=2.0), WIDENS)
    row, column = torch.arange(36).double(), torch.arange(24).double()
    expected = torch.zeros(36, 24, dtype=torch.float64)
    for place, value in zip(module.shared["of864"].tolist(), module.coefficients, strict=True):
        phase = (place // 24) * row[:, None] / 36 + (place % 24) * column / 24
        expected = expected + value * torch.cos(2 * math.pi * phase) / (36 * 24)
    close(module.delta(), 2 * expected)


@pytest.mark.parametrize("site", SHAPES, ids=lambda s: s.workspace)
def test_randlora_sums_scaled_random_products(site: Site) -> None:
    module = made(RandLoRA(rank=7, alpha=14), site)
    inner, outer = module.shared["inner"], module.shared["outer"]
    small, large = 24, max(site.shape)
    expected = torch.zeros(large, small, dtype=torch.float64)
    assert module.gains.shape == (4, small)
    for n in range(4):
        scaled = torch.diag(module.weights[:, n]) @ inner[:, :small] @ torch.diag(module.gains[n])
        expected = expected + 2 * outer[:large, :4].flatten(1)[:, n::4].double() @ scaled
    close(module.delta(), expected.mT if site is NARROWS else expected)


# --- ranks and counts


def rank(technique: Technique, site: Site = SQUARE) -> int:
    return int(torch.linalg.matrix_rank(made(technique, site).delta()))


def test_ranks() -> None:
    assert rank(LoHa(rank=3)) == 9
    assert rank(LoKr(rank=2)) == 4 * 2  # 24 = 4 * 6: rank of the left times that of the right
    assert rank(VeRA(rank=7)) == 7
    assert rank(MiSS(rank=5)) == 5
    assert rank(RandLoRA(rank=5)) == 24
    assert rank(SHiRA(rank=3)) > 20
    assert rank(FourierFT(count=60)) > 20


@pytest.mark.parametrize(
    ("technique", "expected"),
    [
        (LoHa(rank=3), 2 * 3 * (36 + 24)),
        (LoKr(rank=2), 6 * 4 + 2 * (6 + 6)),  # 36 = 6 * 6, 24 = 4 * 6
        (LoKr(rank=3), 6 * 4 + 6 * 6),
        (VeRA(rank=7), 7 + 36),
        (MiSS(rank=5), 5 * 36),
        (SHiRA(rank=2), 2 * (36 + 24)),
        (FourierFT(count=30), 30),
        (RandLoRA(rank=7), 4 * (7 + 24)),
    ],
    ids=repr,
)
def test_parameter_counts(technique: Technique, expected: int) -> None:
    assert by_hand.count([by_hand.build_one(technique, WIDENS)]) == expected


def test_convolutions_keep_their_kernel_in_one_factor() -> None:
    site = dataclasses.replace(WIDENS, kind=Kind.CONVOLUTION, kernel=(3, 3), width_in=6 * 9)
    module = made(LoKr(rank=1), site)
    assert module.left.shape == (6, 2)
    assert module.right[1].shape == (1, 3 * 9)
    assert module.delta().shape == (36, 54)


@pytest.mark.parametrize(
    ("technique", "what"),
    [
        (LoHa(rank=25), "rank=25 is above a side of the 36 x 24 matrix 0/feedforward.up"),
        (MiSS(rank=25), "rank=25 is above the 24 input channels of 0/feedforward.up"),
        (SHiRA(rank=15), "900 values, and the matrix 0/feedforward.up has 864; take rank at most 14"),
        (FourierFT(count=900), "count=900 is above the 864 frequencies"),
        (RandLoRA(rank=25), "rank=25 is above the smaller side, 24, of 0/feedforward.up"),
    ],
    ids=lambda value: value.name if isinstance(value, Technique) else "",
)
def test_what_is_too_large_is_refused(technique: Technique, what: str) -> None:
    with pytest.raises(BadOption, match=what):
        technique.build(WIDENS)


@pytest.mark.parametrize("technique", CASES.values(), ids=CASES)
def test_only_matrices_that_multiply_are_chosen(technique: Technique) -> None:
    assert technique.fits(SQUARE)
    assert not technique.fits(by_hand.EMBEDDING)
    assert not technique.fits(by_hand.NORM)


@pytest.mark.parametrize("kind", [VeRA, SHiRA, FourierFT, RandLoRA])
def test_what_a_seed_stands_for_is_the_same_each_time_and_in_no_file(kind: type[Technique]) -> None:
    small = {VeRA: {"rank": 4}, SHiRA: {"rank": 4}, FourierFT: {"count": 40}, RandLoRA: {"rank": 4}}[kind]
    torch.manual_seed(0)
    first = by_hand.build_one(kind(**small), WIDENS)
    torch.manual_seed(1)
    second = by_hand.build_one(kind(**small), WIDENS)
    other = by_hand.build_one(kind(**small, seed=5), WIDENS)
    named = list(first.named_buffers())
    assert named
    assert all(torch.equal(tensor, second.get_buffer(name)) for name, tensor in named)
    assert not any(torch.equal(tensor, other.get_buffer(name)) for name, tensor in named)
    assert not [name for name in first.state_dict() if name.startswith("shared.")]


# --- agreement with HF PEFT's layers for equal parameters


def peer(config: peft.PeftConfig, site: Site) -> Any:
    """HF PEFT's layer in float64 around a layer of the site's shape, its trained tensors random."""
    host = nn.Sequential(nn.Linear(site.width_in, site.width_out, bias=False)).double()
    model = peft.get_peft_model(host, config).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    for tensor in model.parameters():
        if tensor.requires_grad:
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return model.base_model.model[0]


def agrees(layer: Any, module: DeltaModule, site: Site) -> None:
    x = signal(2, 3, site.width_in)
    base = x @ layer.get_base_layer().weight.T
    torch.testing.assert_close(base + x @ module.delta().mT, layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [2, 5])
def test_loha_agrees_with_peft(rank: int) -> None:
    layer = peer(peft.LoHaConfig(r=rank, alpha=3, target_modules=["0"]), WIDENS)
    module = made(LoHa(rank=rank, alpha=3), WIDENS)
    pairs = {"up1": "w1_a", "down1": "w1_b", "up2": "w2_a", "down2": "w2_b"}
    for own, theirs in pairs.items():
        getattr(module, own).data = getattr(layer, f"hada_{theirs}")["default"].data
    agrees(layer, module, WIDENS)


@pytest.mark.parametrize(("rank", "factor"), [(2, None), (9, None), (2, 3), (2, 5)])
def test_lokr_agrees_with_peft(rank: int, factor: int | None) -> None:
    config = peft.LoKrConfig(r=rank, alpha=3, decompose_factor=factor or -1, target_modules=["0"])
    layer = peer(config, WIDENS)
    module = made(LoKr(rank=rank, alpha=3, factor=factor), WIDENS)
    theirs = [layer.lokr_w1, layer.lokr_w2, layer.lokr_w2_a, layer.lokr_w2_b]
    values = [held["default"].data for held in theirs if "default" in held]
    for own, value in zip(module.parameters(), values, strict=True):
        assert own.shape == value.shape
        own.data = value
    agrees(layer, module, WIDENS)


def test_vera_agrees_with_peft_and_draws_the_same_matrices() -> None:
    config = peft.VeraConfig(r=7, projection_prng_key=3, target_modules=["0"])
    layer = peer(config, WIDENS)
    module = made(VeRA(rank=7, seed=3), WIDENS)
    close(module.shared["down"], layer.vera_A["default"].double())
    close(module.shared["up"], layer.vera_B["default"].double())
    module.inner.data, module.outer.data = (
        layer.vera_lambda_d["default"].data,
        layer.vera_lambda_b["default"].data,
    )
    agrees(layer, module, WIDENS)


@pytest.mark.parametrize("rank", [4, 7])
def test_miss_agrees_with_peft(rank: int) -> None:
    layer = peer(peft.MissConfig(r=rank, target_modules=["0"]), WIDENS)
    module = made(MiSS(rank=rank), WIDENS)
    module.block.data = layer.miss_block["default"].data
    agrees(layer, module, WIDENS)


def test_shira_agrees_with_peft_and_draws_the_same_places() -> None:
    layer = peer(peft.ShiraConfig(r=3, random_seed=11, target_modules=["0"]), WIDENS)
    module = made(SHiRA(rank=3, seed=11), WIDENS)
    rows, columns = layer.shira_indices["default"].long()
    assert torch.equal(module.shared["36x24"], rows * 24 + columns)
    module.values.data = layer.shira_weight["default"].data
    agrees(layer, module, WIDENS)


def test_fourierft_agrees_with_peft_and_draws_the_same_frequencies() -> None:
    layer = peer(peft.FourierFTConfig(n_frequency=30, scaling=2.0, target_modules=["0"]), WIDENS)
    module = made(FourierFT(count=30, alpha=2.0), WIDENS)
    module.coefficients.data = layer.fourierft_spectrum["default"].data
    agrees(layer, module, WIDENS)


@pytest.mark.parametrize("site", SHAPES, ids=lambda s: s.workspace)
@pytest.mark.parametrize("rank", [6, 7])
def test_randlora_agrees_with_peft_and_draws_the_same_bases(rank: int, site: Site) -> None:
    layer = peer(peft.RandLoraConfig(r=rank, randlora_alpha=14, target_modules=["0"]), site)
    module = made(RandLoRA(rank=rank, alpha=14), site)
    module.weights.data = layer.randlora_lambda["default"].data
    module.gains.data = layer.randlora_gamma["default"].data
    torch.testing.assert_close(module.shared.inner, layer.randlora_A["default"][:, 0].double())
    torch.testing.assert_close(module.shared.outer, layer.randlora_B["default"].double())
    agrees(layer, module, site)
