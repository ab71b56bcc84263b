"""OFT, BOFT and HRA against their definitions in float64 and against peft."""

from __future__ import annotations

import dataclasses

import handmade as by_hand
import peft
import pytest
import torch
from handmade import LENGTH, WIDTH
from torch import Tensor, nn

import graftwork as gw
from graftwork.errors import BadOption
from graftwork.reference.technique import Technique
from graftwork.techniques.oft import cayley

EXACT: dict[str, Technique] = {
    "oft": gw.OFT(block=4),
    "oft-one-block": gw.OFT(block=8, one_block=True),
    "oft-odd": gw.OFT(block=3, workspaces=("odd",)),
    "boft": gw.BOFT(block=4),
    "boft-3": gw.BOFT(block=4, butterflies=3),
    "boft-odd": gw.BOFT(block=3, workspaces=("odd",)),
    "hra": gw.HRA(rank=6),
}
ALL = {**EXACT, "oft-series": gw.OFT(block=4, terms=5), "boft-series": gw.BOFT(butterflies=2, terms=4)}


def width(technique: Technique) -> int:
    return 15 if technique.workspaces else WIDTH


def module_of(technique: Technique, size: float = 0.4, out: int = 7) -> nn.Module:
    return by_hand.jittered(technique.build(by_hand.linear("query", out, width(technique))), size=size)


def rotation(technique: Technique, module: nn.Module) -> Tensor:
    """R, read off W = I."""
    if hasattr(module, "gain"):
        module.gain.data = torch.ones(width(technique), dtype=torch.float64)
    one = torch.eye(width(technique), dtype=torch.float64)
    return module.effective(one, one)


def double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def skew(vector: Tensor, size: int) -> Tensor:
    """Q from its entries above the diagonal, one by one."""
    q = torch.zeros(size, size, dtype=vector.dtype)
    pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
    for (i, j), value in zip(pairs, vector, strict=True):
        q[i, j], q[j, i] = value, -value
    return q


def inverse_cayley(vector: Tensor, size: int) -> Tensor:
    q, one = skew(vector, size), torch.eye(size, dtype=vector.dtype)
    return (one + q) @ torch.linalg.inv(one - q)


# --- the checks of the papers' note


@pytest.mark.parametrize("technique", EXACT.values(), ids=EXACT)
def test_check_rotations_are_orthogonal(technique: Technique) -> None:
    found = rotation(technique, module_of(technique, out=width(technique)))
    close(found.T @ found, torch.eye(width(technique), dtype=torch.float64))


def test_check_toy_cayley() -> None:
    close(cayley(double([0.5]), 2), double([[0.6, 0.8], [-0.8, 0.6]]))


def test_check_toy_reflection() -> None:
    technique = gw.HRA(rank=2)
    module = technique.build(by_hand.linear("query", 2, 2)).double()
    reflection = double([[0.28, -0.96], [-0.96, -0.28]])
    module.vectors.data = double([[0.6, 0.8], [1.0, 0.0]])  # the second turns the sign of x_1
    one = torch.eye(2).double()
    close(module.effective(one, one), reflection @ torch.diag(double([-1.0, 1.0])))


@pytest.mark.parametrize(
    ("technique", "count"),
    [
        (gw.OFT(block=4), 4 * 6),
        (gw.OFT(block=8, one_block=True), 28),
        (gw.BOFT(block=4, butterflies=3), 3 * 4 * 6 + 7),
        (gw.HRA(rank=6), 6 * WIDTH),
    ],
    ids=lambda value: value.name if isinstance(value, Technique) else "",
)
def test_check_counts(technique: Technique, count: int) -> None:
    assert by_hand.count([module_of(technique)]) == count


# --- definitions


def test_oft_is_a_block_diagonal_of_cayley_transforms() -> None:
    module = module_of(gw.OFT(block=4))
    blocks = [inverse_cayley(vector, 4) for vector in module.skew.detach()]
    weight = by_hand.values(7, WIDTH).double()
    close(module.effective(weight, weight), weight @ torch.block_diag(*blocks))


def test_the_series_is_the_truncated_one() -> None:
    vector = 0.2 * by_hand.values(6).double()
    q, one = skew(vector, 4), torch.eye(4).double()
    close(cayley(vector, 4, terms=2), one + q)
    close(cayley(vector, 4, terms=5), one + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
    close(cayley(vector, 4, terms=80), cayley(vector, 4))


def test_hra_is_a_product_of_reflections() -> None:
    module = module_of(gw.HRA(rank=6))
    weight = by_hand.values(7, WIDTH).double()
    wanted = weight
    for u in module.vectors.detach():
        wanted = wanted @ (torch.eye(WIDTH).double() - 2 * torch.outer(u, u) / (u @ u))
    close(module.effective(weight, weight), wanted)


def butterfly_permutation(level: int, block: int) -> Tensor:
    """P of one factor after peft's indices, as a matrix."""
    layer = peft.tuners.boft.layer.BOFTLayer
    indices = layer.block_butterfly_perm(None, WIDTH, WIDTH // block // 2**level, block // 2, 1)
    return torch.eye(WIDTH).double()[indices]


def test_boft_is_a_product_of_permuted_rotations() -> None:
    module = module_of(gw.BOFT(block=4, butterflies=3))
    weight = by_hand.values(7, WIDTH).double()
    wanted = weight
    for level, vectors in enumerate(module.skew.detach()):
        p = butterfly_permutation(level, 4)
        wanted = wanted @ p @ torch.block_diag(*(inverse_cayley(v, 4) for v in vectors)) @ p.T
    close(module.effective(weight, weight), module.gain.detach().unsqueeze(1) * wanted)


def test_three_factors_mix_every_channel_with_every_other() -> None:
    technique = gw.BOFT(block=4, butterflies=3)
    assert (rotation(technique, module_of(technique, out=WIDTH)).abs() > 1e-6).all()
    fewer = gw.BOFT(block=4, butterflies=2)
    assert (rotation(fewer, module_of(fewer, out=WIDTH)).abs() > 1e-6).double().mean() == 0.5


def test_experts_have_rotations_of_their_own() -> None:
    for technique in (gw.OFT(block=4), gw.BOFT(block=4, butterflies=3), gw.HRA(rank=4)):
        module = by_hand.jittered(technique.build(by_hand.EXPERTS), size=0.4)
        weight = by_hand.EXPERTS.matrix().double()
        whole = module.effective(weight, weight)
        for expert in range(3):
            alone = technique.build(dataclasses.replace(by_hand.EXPERTS, batch=())).double()
            for name, tensor in alone.named_parameters():
                tensor.data = module.get_parameter(name).data[expert]
            close(alone.effective(weight[expert], weight[expert]), whole[expert])


# --- the fast path is the definition


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("technique", ALL.values(), ids=ALL)
def test_answer_and_gradients_are_those_of_the_effective_weight(technique: Technique, bias: bool) -> None:
    technique = dataclasses.replace(technique, workspaces=("linear",))
    inner = 15 if "block=3" in repr(technique) else WIDTH
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inner, 7, bias=bias, dtype=torch.float64))
    adapter = gw.attach(model, technique)
    (module,) = adapter.modules.values()
    by_hand.jittered(module, size=0.4)
    x = by_hand.values(2, LENGTH, inner).double().requires_grad_()
    target = by_hand.values(2, LENGTH, 7, seed=9).double()
    y = model(x)
    found = torch.autograd.grad((y * target).sum(), [x, *module.parameters()])
    weight = model[0].weight.detach()
    expected = nn.functional.linear(x, module.effective(weight, weight), model[0].bias)
    close(y, expected)
    wanted = torch.autograd.grad((expected * target).sum(), [x, *module.parameters()])
    for one, other in zip(found, wanted, strict=True):
        close(one, other)


@pytest.mark.parametrize("technique", ALL.values(), ids=ALL)
def test_stacked_they_act_in_order(technique: Technique) -> None:
    technique = dataclasses.replace(technique, workspaces=("linear",))
    inner = 15 if "block=3" in repr(technique) else WIDTH
    model = nn.Sequential(nn.Linear(inner, 7, dtype=torch.float64))
    for name, part in {"low": gw.LoRA(rank=2), "turn": technique, "again": technique}.items():
        for module in gw.attach(model, part, name=name).modules.values():
            by_hand.jittered(module, seed=len(name), size=0.4)
    x = by_hand.values(3, inner).double()
    for order in (("low", "turn", "again"), ("turn", "low", "again")):
        with gw.active(model, *order):
            running = model(x)
            gw.merge(model, *order)
            close(model(x), running)
            gw.unmerge(model)


@pytest.mark.parametrize("technique", [gw.OFT(block=4), gw.HRA(rank=2)], ids=["oft", "hra"])
def test_backward_keeps_the_input_and_nothing_of_its_size_beside(technique: Technique) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    gw.attach(model, dataclasses.replace(technique, workspaces=("linear",)))
    x = torch.randn(64, WIDTH, requires_grad=True)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        model(x)
    assert sum(tensor.numel() == x.numel() for tensor in kept.values()) == 1


# --- agreement with peft


def peft_layer(config: peft.PeftConfig, bias: bool = True) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 7, bias=bias)).double()
    wrapped = peft.get_peft_model(model, config).double()
    return wrapped, wrapped.base_model.model[0]


@pytest.mark.parametrize(("terms", "sign"), [(None, 1), (5, -1)])
@pytest.mark.parametrize("one_block", [False, True])
def test_oft_agrees_with_peft(terms: int | None, sign: int, one_block: bool) -> None:
    """HF PEFT's exact form turns as ours does, its series (the default) the other way."""
    series = {"use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5}
    config = peft.OFTConfig(
        r=0, oft_block_size=4, block_share=one_block, bias="none", target_modules=["0"], **series
    )
    theirs, layer = peft_layer(config)
    module = module_of(gw.OFT(block=4, terms=terms, one_block=one_block))
    layer.oft_R["default"].weight.data = sign * module.skew.data
    base = layer.base_layer
    x = by_hand.values(3, WIDTH).double()
    close(theirs(x), nn.functional.linear(x, module.effective(base.weight, base.weight), base.bias))


def test_boft_agrees_with_peft() -> None:
    theirs, layer = peft_layer(peft.BOFTConfig(boft_block_size=4, target_modules=["0"]))
    module = module_of(gw.BOFT(block=4))
    blocks = torch.stack([skew(vector, 4) for vector in module.skew.detach()[0]])
    layer.boft_R["default"].data = 2 * blocks.triu().unsqueeze(0)
    layer.boft_s["default"].data = module.gain.data.unsqueeze(1)
    x = by_hand.values(3, WIDTH).double()
    base = layer.base_layer
    torch.testing.assert_close(
        theirs(x),
        nn.functional.linear(x, module.effective(base.weight, base.weight), base.bias),
        rtol=1e-6,  # HF PEFT's identity matrix is in single precision
        atol=1e-6,
    )


def test_hra_agrees_with_peft() -> None:
    theirs, layer = peft_layer(peft.HRAConfig(r=4, target_modules=["0"]))
    module = module_of(gw.HRA(rank=4))
    layer.hra_u["default"].data = module.vectors.data.T.contiguous()
    x = by_hand.values(3, WIDTH).double()
    base = layer.base_layer
    close(theirs(x), nn.functional.linear(x, module.effective(base.weight, base.weight), base.bias))


# --- errors


@pytest.mark.parametrize(
    ("technique", "text"),
    [
        (gw.OFT(block=32), "oft: block=32 does not divide the input width 16 .* divisors 2, 4, 8, 16"),
        (gw.BOFT(block=3), "boft: block=3 does not divide the input width 16"),
        (gw.BOFT(block=4, butterflies=4), r"block \* 2\^\(butterflies-1\)=32 does not divide"),
        (gw.HRA(rank=3), "rank=3 is odd.* choose 2 or 4"),
    ],
    ids=lambda value: value.name if isinstance(value, Technique) else "",
)
def test_what_does_not_fit_says_what_would(technique: Technique, text: str) -> None:
    with pytest.raises(BadOption, match=text):
        technique.build(by_hand.QUERY)


def test_several_butterflies_need_even_blocks() -> None:
    with pytest.raises(BadOption, match="block=3 must be even"):
        gw.BOFT(block=3, butterflies=2).build(by_hand.linear("query", 7, 12))
