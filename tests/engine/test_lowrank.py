"""Low-rank functions against the definition written out in autograd, in float64 where it matters."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from graftwork.engine.dropout import Drop
from graftwork.engine.lowrank import low_rank_embedding, low_rank_linear
from graftwork.errors import BadOption

IN, OUT, RANK = 6, 5, 3


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def leaf(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def definition(x, weight, bias, down, up, scale, mask=None):
    inner = torch.einsum("...i,ri->...r", x, down)
    inner = inner if mask is None else inner * mask
    delta = scale * torch.einsum("...r,or->...o", inner, up)
    if weight is None:
        return delta
    base = torch.einsum("...i,oi->...o", x, weight)
    return delta + base + (0 if bias is None else bias)


MASKS = {None: None, "sample": (2, 1, RANK), "token": (2, 4, RANK), "all": (RANK,)}


@pytest.mark.slow
@pytest.mark.parametrize("lead", [(), (4,), (2, 4), (2, 2, 4)])
@pytest.mark.parametrize("host", ["none", "weight", "weight and bias", "transposed view"])
def test_first_and_second_gradients(lead, host):
    weight = None if host == "none" else leaf(OUT, IN)
    bias = leaf(OUT) if host == "weight and bias" else None

    def run(x, down, up, weight, bias):
        view = weight.t().contiguous().t() if host == "transposed view" else weight
        return low_rank_linear(x, view, bias, down, up, 0.7)

    inputs = (leaf(*lead, IN), leaf(RANK, IN), leaf(OUT, RANK), weight, bias)
    torch.testing.assert_close(run(*inputs), definition(inputs[0], weight, bias, *inputs[1:3], 0.7))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("kind", ["sample", "token", "all"])
@pytest.mark.parametrize("hosted", [True, False])
def test_mask_and_its_gradient(kind, hosted):
    mask = torch.rand(*MASKS[kind], dtype=torch.float64).requires_grad_()
    weight, bias = (leaf(OUT, IN, grad=False), leaf(OUT, grad=False)) if hosted else (None, None)
    inputs = leaf(2, 4, IN), leaf(RANK, IN), leaf(OUT, RANK), mask

    def run(x, down, up, mask):
        return low_rank_linear(x, weight, bias, down, up, -1.3, mask=mask)

    expected = definition(inputs[0], weight, bias, *inputs[1:3], -1.3, mask)
    torch.testing.assert_close(run(*inputs), expected)
    assert torch.autograd.gradcheck(run, inputs)
    with torch.no_grad():
        boolean = mask > 0.5
        torch.testing.assert_close(
            low_rank_linear(inputs[0], weight, bias, *inputs[1:3], -1.3, mask=boolean),
            definition(inputs[0], weight, bias, *inputs[1:3], -1.3, boolean.double()),
        )


def test_stacked_factors_serve_equal_runs_of_rows():
    x, weight, bias = leaf(6, 2, IN), leaf(OUT, IN), leaf(OUT)
    down, up = leaf(3, RANK, IN), leaf(3, OUT, RANK)

    def run(x, weight, bias, down, up):
        return low_rank_linear(x, weight, bias, down, up, 0.7)

    rows = [definition(x[2 * k : 2 * k + 2], weight, bias, down[k], up[k], 0.7) for k in range(3)]
    torch.testing.assert_close(run(x, weight, bias, down, up), torch.cat(rows))
    assert torch.autograd.gradcheck(run, (x, weight, bias, down, up))


@pytest.mark.parametrize("frozen", range(5))
def test_only_what_is_needed(frozen):
    """Any of the tensors may be frozen; the rest get the same gradients."""
    tensors = [leaf(4, IN), leaf(OUT, IN), leaf(OUT), leaf(RANK, IN), leaf(OUT, RANK)]
    tensors[frozen].requires_grad_(False)
    rest = [t for t in tensors if t.requires_grad]
    dy = torch.randn(4, OUT, dtype=torch.float64)
    ours = torch.autograd.grad(low_rank_linear(*tensors, 0.7), rest, dy)
    theirs = torch.autograd.grad(definition(*tensors, 0.7), rest, dy)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_result_may_be_changed_in_place_and_gradients_are_optional():
    x, weight, down, up = leaf(2, 4, IN), leaf(OUT, IN, grad=False), leaf(RANK, IN), leaf(OUT, RANK)
    expected = definition(x, weight, None, down, up, 0.7)
    with torch.no_grad():
        torch.testing.assert_close(low_rank_linear(x, weight, None, down, up, 0.7), expected)
    y = low_rank_linear(x, weight, None, down, up, 0.7)
    y += 1.0
    torch.testing.assert_close(torch.autograd.grad(y.sum(), down), torch.autograd.grad(expected.sum(), down))


def test_a_fresh_delta_changes_no_bit():
    x, weight, bias = (
        leaf(64, 32, dtype=torch.float32),
        leaf(48, 32, dtype=torch.float32),
        leaf(48, dtype=torch.float32),
    )
    for dtype in (torch.float32, torch.bfloat16):
        host = x.to(dtype), weight.to(dtype), bias.to(dtype)
        y = low_rank_linear(*host, torch.randn(4, 32), torch.zeros(48, 4), 2.0)
        assert torch.equal(y, functional.linear(*host))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-3), (torch.float16, 8e-4)])
def test_low_precision_with_fp32_factors(dtype, tolerance):
    """Against float64; the tolerance is a relative norm a little above one rounding of the inputs' type."""
    x = leaf(256, 64, dtype=dtype)
    weight = (torch.randn(48, 64) / 8).to(dtype)
    down, up = leaf(8, 64, dtype=torch.float32), leaf(48, 8, dtype=torch.float32)
    dy = torch.randn(256, 48).to(dtype)
    y = low_rank_linear(x, weight, None, down, up, 0.25)
    grads = torch.autograd.grad(y, (x, down, up), dy)
    assert y.dtype == dtype
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]
    exact = [t.detach().double().requires_grad_() for t in (x, down, up)]
    reference = definition(exact[0], weight.double(), None, *exact[1:], 0.25)
    expected = torch.autograd.grad(reference, exact, dy.double())
    for got, want in zip((y, *grads), (reference, *expected), strict=True):
        assert (got.double() - want).norm() / want.norm() < tolerance


def saved_storages(forward, *left_out: Tensor) -> dict[int, int]:
    """Bytes by storage of what autograd was handed during `forward`."""
    ignore = {t.untyped_storage().data_ptr() for t in left_out}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignore:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_projections_of_one_tensor_keep_it_once_and_nothing_else(dtype, dropout):
    weights = [leaf(48, 64, dtype=dtype, grad=False) for _ in range(3)]
    factors = [(leaf(4, 64, dtype=torch.float32), leaf(48, 4, dtype=torch.float32)) for _ in range(3)]
    source = leaf(2, 16, 64, dtype=dtype)
    x = source * 2  # as a norm's answer: no parameter, no input

    def forward() -> list[Tensor]:
        return [
            low_rank_linear(x, w, None, down, up, 1.0, dropout=dropout)
            for w, (down, up) in zip(weights, factors, strict=True)
        ]

    found = saved_storages(forward, *weights, *itertools.chain(*factors))
    assert found == {x.untyped_storage().data_ptr(): x.numel() * x.element_size()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("masked", [True, False])
def test_beside_a_frozen_first_factor_the_inner_product_is_kept_and_not_the_input(masked, dropout):
    x, down, up = leaf(2, 4, IN) * 1, leaf(RANK, IN, grad=False), leaf(OUT, RANK)
    weight, mask = leaf(OUT, IN, grad=False), leaf(RANK) if masked else None

    def run():
        torch.manual_seed(1)  # the same dropout
        return low_rank_linear(x, weight, None, down, up, 0.7, dropout=dropout, mask=mask)

    found = saved_storages(run, weight, down, up, *([mask] if masked else []))
    assert x.untyped_storage().data_ptr() not in found
    assert sum(found.values()) == 2 * 4 * RANK * 8
    wanted = [x, up, mask] if masked else [x, up]
    dy = torch.randn(2, 4, OUT, dtype=torch.float64)
    gradients = torch.autograd.grad(run(), wanted, dy)
    trains = down.requires_grad_()
    for got, want in zip(gradients, torch.autograd.grad(run(), wanted, dy), strict=True):
        torch.testing.assert_close(got, want)
    trains.requires_grad_(False)
    (first,) = torch.autograd.grad(run().square().sum(), up, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_frozen_factors_keep_nothing():
    x, weight = leaf(8, IN) * 1, leaf(OUT, IN, grad=False)
    down, up = leaf(RANK, IN, grad=False), leaf(OUT, RANK, grad=False)
    assert not saved_storages(lambda: low_rank_linear(x, weight, None, down, up, 1.0), weight, down, up)


@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_dropout_has_the_stated_rate_and_no_structure(dropout):
    rows, width = 512, 512
    drop = Drop.draw(dropout)
    assert drop is not None
    rate = drop.dropped / 256
    assert abs(rate - dropout) <= 1 / 512
    kept = drop.apply(torch.ones(rows, width))
    spread = math.sqrt(rate * (1 - rate))
    assert abs(1 - kept.mean() - rate) < 5 * spread / math.sqrt(rows * width)
    assert abs((kept * drop.gain).mean() - 1) < 5 * spread / (1 - rate) / math.sqrt(rows * width)
    for axis, count in ((0, rows), (1, width)):  # means of columns and rows scatter like independent draws
        scatter = kept.mean(axis).var() / (spread**2 / count)
        assert 0.7 < scatter < 1.3
    flat = (kept.flatten() - kept.mean()) / spread
    for lag in (1, 2, 3, 7, 8, 9, 64, 511, 512, 513):
        assert abs((flat[:-lag] * flat[lag:]).mean()) < 5 / math.sqrt(rows * width)
    other = Drop.draw(dropout).apply(torch.ones(rows, width)).flatten()
    assert abs((flat * (other - other.mean()) / spread).mean()) < 5 / math.sqrt(rows * width)


def test_dropout_is_the_definition_with_that_mask():
    weight, bias = leaf(OUT, IN), leaf(OUT)
    x, down, up = leaf(2, 4, IN), leaf(RANK, IN), leaf(OUT, RANK)
    tensors = (x, weight, bias, down, up)
    torch.manual_seed(3)
    ours = low_rank_linear(*tensors, 0.7, dropout=0.4)
    torch.manual_seed(3)
    drop = Drop.draw(0.4)
    mask = drop.apply(torch.ones_like(x)) * drop.gain
    theirs = definition(x * mask, None, None, down, up, 0.7) + functional.linear(x, weight, bias)
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn(2, 4, OUT, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(ours, tensors, dy), torch.autograd.grad(theirs, tensors, dy), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dropout_zeroes_and_leaves_every_bit_else(dtype):
    x = torch.randn(7, 5, 3, dtype=dtype).transpose(0, 1)
    x[0, 0, :3] = torch.tensor([-0.0, torch.inf, torch.nan])
    for dropped in range(1, 256):
        got = Drop(dropped, dropped).apply(x)
        chosen = Drop(dropped, dropped).apply(x.clone().requires_grad_())  # the way that autograd can follow
        torch.testing.assert_close(got, chosen, rtol=0, atol=0, equal_nan=True)
        rate = (Drop(dropped, dropped).apply(torch.ones(4096)) == 0).float().mean()
        assert abs(rate - dropped / 256) < 5 * 0.5 / 64


def test_second_gradients_through_dropout():
    inputs = leaf(4, IN), leaf(OUT, IN), leaf(RANK, IN), leaf(OUT, RANK)

    def run(x, weight, down, up):
        torch.manual_seed(11)
        return low_rank_linear(x, weight, None, down, up, 0.7, dropout=0.4)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 0.999])
def test_impossible_dropout(dropout):
    with pytest.raises(BadOption, match="dropout"):
        Drop.draw(dropout)


def test_dropout_that_rounds_to_zero_is_none():
    assert Drop.draw(0.001) is None


class Layer(nn.Module):
    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24, dtype=dtype)
        self.second = nn.Linear(24, 16, dtype=dtype)
        self.requires_grad_(False)
        self.downs = nn.ParameterList([torch.randn(4, 16), torch.randn(4, 24)])
        self.ups = nn.ParameterList([torch.randn(24, 4) / 8, torch.randn(16, 4) / 8])
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        for host, down, up in zip((self.first, self.second), self.downs, self.ups, strict=True):
            x = torch.tanh(low_rank_linear(x, host.weight, host.bias, down, up, 0.5, dropout=self.dropout))
        return x


def trained(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def gradients(layer: nn.Module, forward, x: Tensor) -> list[Tensor]:
    return list(
        torch.autograd.grad(forward(x).square().sum(), [p for p in layer.parameters() if p.requires_grad])
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_draws_the_same_mask(reentrant):
    layer = Layer(dropout=0.4)
    x = torch.randn(8, 16, requires_grad=True)
    torch.manual_seed(5)
    plain = gradients(layer, layer, x)
    torch.manual_seed(5)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for expected, parameter in zip(plain, trained(layer), strict=True):
        assert torch.equal(parameter.grad, expected)
    torch.manual_seed(6)
    assert not torch.equal(gradients(layer, layer, x)[0], plain[0])


def test_functional_transforms():
    """vmap over stacked adapters, per-sample gradients and their nesting agree with a loop."""
    weight, bias = leaf(OUT, IN, grad=False), leaf(OUT, grad=False)
    x, downs, ups = leaf(4, IN, grad=False), leaf(3, RANK, IN, grad=False), leaf(3, OUT, RANK, grad=False)
    run = functools.partial(low_rank_linear, x, weight, bias)
    stacked = torch.func.vmap(lambda down, up: run(down, up, 0.7))(downs, ups)
    torch.testing.assert_close(
        stacked, torch.stack([run(a, b, 0.7) for a, b in zip(downs, ups, strict=True)])
    )

    def loss(down, up, row):
        return low_rank_linear(row, weight, bias, down, up, 0.7).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(
        downs[0], ups[0], x
    )
    for i in range(4):
        pair = downs[0].clone().requires_grad_(), ups[0].clone().requires_grad_()
        expected = torch.autograd.grad(definition(x[i], weight, bias, *pair, 0.7).square().sum(), pair)
        for got, want in zip(per_sample, expected, strict=True):
            torch.testing.assert_close(got[i], want)
    hessian = torch.func.hessian(loss)(downs[0], ups[0], x[0])
    torch.testing.assert_close(
        hessian, torch.autograd.functional.hessian(lambda d: loss(d, ups[0], x[0]), downs[0])
    )


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_compiles_in_one_graph_with_its_backward(dropout):
    torch.compiler.reset()
    layer = Layer(dropout)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 16)
    ours = gradients(layer, compiled, x)
    if dropout:
        assert all(g.isfinite().all() and g.any() for g in ours)
        return
    for a, b in zip(ours, gradients(layer, layer, x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_gives_what_autocast_gives(base):
    """The precision of a plain layer and the gradients of plain autograd, in the region and after it."""
    layer = Layer(dtype=base)
    x = torch.randn(32, 16)

    def plain(x):
        for host, down, up in zip((layer.first, layer.second), layer.downs, layer.ups, strict=True):
            delta = functional.linear(functional.linear(x, down), up) * 0.5
            x = torch.tanh(functional.linear(x, host.weight, host.bias) + delta)
        return x

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == plain(x).dtype == torch.bfloat16
        with torch.no_grad():
            assert torch.equal(layer(x), y)
        inside = gradients(layer, layer, x)
        expected = gradients(layer, plain, x)
    outside = torch.autograd.grad(y.square().sum(), trained(layer))
    for got, late, want in zip(inside, outside, expected, strict=True):
        assert got.dtype == want.dtype == torch.float32
        assert (got - want).norm() / want.norm() < 0.02
        assert (late - want).norm() / want.norm() < 0.02


def test_autocast_keeps_the_input_itself():
    weights = [leaf(48, 64, dtype=torch.float32, grad=False) for _ in range(3)]
    down, up = leaf(4, 64, dtype=torch.float32), leaf(48, 4, dtype=torch.float32)
    x = leaf(8, 64, dtype=torch.float32) * 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = saved_storages(
            lambda: [low_rank_linear(x, w, None, down, up, 1.0) for w in weights], *weights, down, up
        )
    assert list(found) == [x.untyped_storage().data_ptr()]


@pytest.mark.parametrize("padding", [None, 2])
def test_embedding_is_the_rows_of_the_dense_delta(padding):
    ids = torch.randint(0, 7, (2, 5))
    down, up = leaf(RANK, 7), leaf(OUT, RANK)

    def run(down, up):
        return low_rank_embedding(ids, down, up, 0.7, padding_idx=padding)

    dense = functional.embedding(ids, (0.7 * up @ down).t(), padding_idx=padding)
    torch.testing.assert_close(run(down, up), dense)
    dy = torch.randn(2, 5, OUT, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(run(down, up), down, dy), torch.autograd.grad(dense, down, dy)
    )
    if padding is None:
        assert torch.autograd.gradcheck(run, (down, up))
        assert torch.autograd.gradgradcheck(run, (down, up))
    with torch.no_grad():
        torch.testing.assert_close(run(down, up), dense)


def test_embedding_keeps_the_ids_alone_and_answers_in_the_host_precision():
    ids = torch.randint(0, 7, (2, 5))
    down, up = leaf(RANK, 7, dtype=torch.float32), leaf(OUT, RANK, dtype=torch.float32)
    found = saved_storages(lambda: low_rank_embedding(ids, down, up, 0.7, dtype=torch.bfloat16), down, up)
    assert list(found) == [ids.untyped_storage().data_ptr()]
    y = low_rank_embedding(ids, down, up, 0.7, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), (down, up)))


def test_a_few_rows_in_low_precision_are_rounded_once() -> None:
    """Decoding: the thin products are computed in fp32, so a delta is its exact value rounded to bf16."""
    torch.manual_seed(0)
    x, down, up = torch.randn(4, 1, 64).bfloat16(), torch.randn(8, 64), torch.randn(32, 8)
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    exact = 0.5 * x.double() @ down.double().mT @ up.double().mT
    with torch.no_grad():
        found = low_rank_linear(x, weight, None, down, up, 0.5)
        alone = low_rank_linear(x, None, None, down, up, 0.5)
    assert found.dtype is alone.dtype is torch.bfloat16
    assert torch.equal(found, exact.bfloat16())
    assert torch.equal(alone, exact.bfloat16())
