"""Lean host functions against the host's own operations under plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from graftwork.analysis.saved import saved_bytes
from graftwork.engine.chunked_loss import chunked_cross_entropy
from graftwork.engine.lean import Projection, gated_feedforward, rms_norm
from graftwork.errors import UnknownName

WIDE, INNER, RANK, VOCABULARY = 6, 10, 3, 17
ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def projection(width_in: int, width_out: int, *, bias: bool = False, factors: bool = True) -> Projection:
    double = {"dtype": torch.float64}
    return Projection(
        torch.randn(width_out, width_in, **double),
        torch.randn(width_out, **double) if bias else None,
        torch.randn(RANK, width_in, **double).requires_grad_() if factors else None,
        torch.randn(width_out, RANK, **double).requires_grad_() if factors else None,
        0.7,
    )


def definition(x: Tensor, layer: Projection) -> Tensor:
    y = functional.linear(x, layer.weight, layer.bias)
    return y if layer.down is None else y + layer.scale * (x @ layer.down.t()) @ layer.up.t()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "adapted", [(True, True, True), (True, False, False), (False, True, True), (False,) * 3]
)
def test_gated_feedforward(activation, adapted):
    gate, up = (projection(WIDE, INNER, bias=True, factors=each) for each in adapted[:2])
    down = projection(INNER, WIDE, factors=adapted[2])
    x = torch.randn(2, 3, WIDE, dtype=torch.float64, requires_grad=True)
    ours = gated_feedforward(x, gate, up, down, activation)
    theirs = definition(ACTIVATIONS[activation](definition(x, gate)) * definition(x, up), down)
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(gated_feedforward(x, gate, up, down, activation), theirs)
    leaves = [x, *(t for each in (gate, up, down) for t in each.factors if t is not None)]
    dy = torch.randn_like(x)
    for a, b in zip(*(torch.autograd.grad(y, leaves, dy) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
    if activation == "silu":
        assert torch.autograd.gradcheck(lambda *_: gated_feedforward(x, gate, up, down), leaves)


@pytest.mark.parametrize("frozen", ["x", "down", "up"])
def test_gated_feedforward_with_a_frozen_part(frozen):
    layers = projection(WIDE, INNER), projection(WIDE, INNER), projection(INNER, WIDE)
    x = torch.randn(4, WIDE, dtype=torch.float64, requires_grad=True)
    for tensor in {"x": [x], "down": [a.down for a in layers], "up": [a.up for a in layers]}[frozen]:
        tensor.requires_grad_(False)
    leaves = [t for t in (x, *(t for each in layers for t in each.factors)) if t.requires_grad]
    ours = gated_feedforward(x, *layers)
    theirs = definition(functional.silu(definition(x, layers[0])) * definition(x, layers[1]), layers[2])
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_gated_feedforward_with_a_trainable_host_and_an_unknown_activation():
    layers = projection(WIDE, INNER), projection(WIDE, INNER), projection(INNER, WIDE)
    layers[0].weight.requires_grad_()
    x = torch.randn(4, WIDE, dtype=torch.float64)
    (got,) = torch.autograd.grad(gated_feedforward(x, *layers).sum(), layers[0].weight)
    y = definition(functional.silu(definition(x, layers[0])) * definition(x, layers[1]), layers[2])
    torch.testing.assert_close(got, torch.autograd.grad(y.sum(), layers[0].weight)[0])
    with pytest.raises(UnknownName, match="silu"):
        gated_feedforward(x, *layers, "sillu")


def llama_layers(dtype: torch.dtype) -> tuple[LlamaMLP, list[Projection]]:
    host = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=88)).to(dtype).requires_grad_(False)
    linears: list[nn.Linear] = [host.gate_proj, host.up_proj, host.down_proj]
    return host, [
        Projection(
            linear.weight,
            None,
            torch.randn(4, linear.in_features).mul_(0.1).requires_grad_(),
            torch.zeros(linear.out_features, 4).requires_grad_(),
            2.0,
        )
        for linear in linears
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_delta_leaves_a_llama_feedforward_bitwise(dtype):
    host, layers = llama_layers(dtype)
    x = torch.randn(2, 16, 32, dtype=dtype, requires_grad=True)
    assert torch.equal(gated_feedforward(x, *layers), host(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_feedforward_keeps_its_input_gate_and_up(dtype):
    _, layers = llama_layers(dtype)
    parameters = [t for each in layers for t in (*each.host, *each.factors) if t is not None]
    source = torch.randn(2, 16, 32, dtype=dtype, requires_grad=True)

    def forward() -> Tensor:
        return gated_feedforward(source * 2, *layers)

    assert saved_bytes(forward, parameters) == 32 * (32 + 2 * 88) * dtype.itemsize


def test_gated_feedforward_under_autocast():
    _, layers = llama_layers(torch.float32)
    leaves = [t.requires_grad_() for each in layers for t in each.factors]
    with torch.no_grad():
        for each in layers:
            each.up.normal_()
    x = torch.randn(64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gated_feedforward(x, *layers)
        theirs = definition(functional.silu(definition(x, layers[0])) * definition(x, layers[1]), layers[2])
        assert ours.dtype == theirs.dtype == torch.bfloat16
        got = torch.autograd.grad(ours.square().sum(), leaves, retain_graph=True)
    want = torch.autograd.grad(theirs.square().sum(), leaves)
    after = torch.autograd.grad(ours.square().sum(), leaves)
    for a, b, c in zip(got, after, want, strict=True):
        assert (a - c).norm() / c.norm() < 0.03
        assert (b - c).norm() / c.norm() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_has_the_numerics_of_llama(dtype, weight_dtype):
    host = LlamaRMSNorm(24, 1e-5).to(weight_dtype)
    nn.init.normal_(host.weight)
    x = (3 * torch.randn(4, 8, 24)).to(dtype).requires_grad_()
    theirs = host(x)
    ours = rms_norm(x, host.weight, 1e-5)
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, host.weight, 1e-5), theirs)
    dy = torch.randn_like(ours)
    got, want = (torch.autograd.grad(y, (x, host.weight), dy) for y in (ours, theirs))
    tolerance = 1e-5 if torch.float32 == dtype == weight_dtype else 1.5e-2
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() / b.double().norm() < tolerance


def test_rms_norm_gradients_in_double_precision_and_what_it_keeps():
    x = torch.randn(3, 4, WIDE, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(WIDE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-5), (x, weight))
    source = torch.randn(4, 8, 24, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(24, dtype=torch.bfloat16)
    assert saved_bytes(lambda: rms_norm(source * 2, weight, 1e-5), [weight]) == source.numel() * 2


def losses(adapted: bool, bias: bool) -> tuple[Tensor, Projection, Tensor]:
    hidden = torch.randn(2, 7, WIDE, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (2, 7))
    labels[0, :3] = -100
    return hidden, projection(WIDE, VOCABULARY, bias=bias, factors=adapted), labels


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 14, 256])
@pytest.mark.parametrize("items", [None, 5, "tensor"])
def test_chunked_loss_is_the_loss(adapted, bias, chunk, items):
    hidden, head, labels = losses(adapted, bias)
    items = torch.tensor(5) if items == "tensor" else items
    factors = (head.down, head.up, head.scale) if adapted else None

    def run() -> Tensor:
        return chunked_cross_entropy(
            hidden, head.weight, labels, head_bias=head.bias, factors=factors, chunk=chunk, items=items
        )

    logits = definition(hidden, head).flatten(0, 1)
    reduction = "mean" if items is None else "sum"
    theirs = functional.cross_entropy(logits, labels.flatten(), reduction=reduction) / (
        1 if items is None else 5
    )
    torch.testing.assert_close(run(), theirs)
    with torch.no_grad():
        torch.testing.assert_close(run(), theirs)
    leaves = [hidden, *head.factors] if adapted else [hidden]
    for a, b in zip(*(torch.autograd.grad(3 * loss, leaves) for loss in (run(), theirs)), strict=True):
        torch.testing.assert_close(a, b)
    if items is None and chunk == 4:
        assert torch.autograd.gradcheck(lambda *_: run(), leaves)


def test_chunked_loss_of_labels_that_are_all_ignored():
    hidden, head, labels = losses(False, False)
    loss = chunked_cross_entropy(hidden, head.weight, torch.full_like(labels, -100))
    assert loss.isnan()  # as torch's
    assert chunked_cross_entropy(hidden, head.weight, torch.full_like(labels, -100), items=3) == 0


def test_chunked_loss_with_a_trainable_head():
    hidden, head, labels = losses(True, False)
    weight = head.weight.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, labels, factors=(head.down, head.up, head.scale))
    plain = functional.cross_entropy(definition(hidden, head).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(plain, weight))


def test_chunked_loss_in_bf16_is_the_loss_of_the_host_and_keeps_the_gradient_alone():
    hidden = torch.randn(3, 100, 64).bfloat16().requires_grad_()
    weight = (torch.randn(512, 64) / 8).bfloat16()
    labels = torch.randint(0, 512, (3, 100))
    loss = chunked_cross_entropy(hidden, weight, labels, chunk=64)
    host = functional.cross_entropy(functional.linear(hidden, weight).float().flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, host, rtol=1e-5, atol=1e-5)
    exact_input = hidden.detach().double().requires_grad_()
    exact = functional.cross_entropy((exact_input @ weight.double().t()).flatten(0, 1), labels.flatten())
    reference = torch.autograd.grad(exact, exact_input)[0]
    for each in (loss, host):  # one more rounding than the host: the loss's own factor comes last
        error = torch.autograd.grad(each, hidden)[0].double() - reference
        assert error.norm() < 5e-3 * reference.norm()
    kept = saved_bytes(lambda: chunked_cross_entropy(hidden * 1, weight, labels), [weight, labels])
    assert kept <= hidden.numel() * 2 + 64  # and the count of rows


def test_chunked_loss_under_autocast():
    hidden = torch.randn(50, 32, requires_grad=True)
    weight, labels = torch.randn(40, 32) / 6, torch.randint(0, 40, (50,))
    down, up = torch.randn(4, 32, requires_grad=True), torch.zeros(40, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, labels, factors=(down, up, 1.0))
        host = functional.cross_entropy(functional.linear(hidden, weight).float(), labels)
    torch.testing.assert_close(loss, host)
    ours, theirs = (torch.autograd.grad(each, hidden)[0] for each in (loss, host))
    assert ours.dtype == torch.float32
    assert (ours - theirs).norm() / theirs.norm() < 0.01


class Block(nn.Module):
    """Norm, feed-forward and loss in one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [projection(WIDE, INNER), projection(WIDE, INNER), projection(INNER, WIDE)]
        self.norm, self.head = torch.randn(WIDE, dtype=torch.float64), projection(WIDE, VOCABULARY)
        self.labels = torch.randint(0, VOCABULARY, (5,))

    def forward(self, x: Tensor) -> Tensor:
        y = x + gated_feedforward(rms_norm(x, self.norm, 1e-6), *self.layers)
        head = self.head
        return chunked_cross_entropy(
            y, head.weight, self.labels, factors=(*head.factors, head.scale), chunk=2
        )

    def gradients(self, loss: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            loss, (x, *(t for each in (*self.layers, self.head) for t in each.factors))
        )


@pytest.mark.parametrize("how", ["checkpoint", pytest.param("compile", marks=pytest.mark.slow), "functorch"])
def test_recomputed_compiled_and_transformed(how):
    block = Block()
    x = torch.randn(5, WIDE, dtype=torch.float64, requires_grad=True)
    expected = block.gradients(block(x), x)
    if how == "functorch":
        torch.testing.assert_close(torch.func.grad(block)(x), expected[0])
        return
    if how == "compile":
        torch.compiler.reset()
        loss = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    else:
        loss = checkpoint(block, x, use_reentrant=False)
    for a, b in zip(block.gradients(loss, x), expected, strict=True):
        torch.testing.assert_close(a, b)
