"""A blend against its definition, y_0 + Σ w_n (y_n - y_0) at each site, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graftwork as gw
from graftwork.engine.recompute import enable_checkpointing
from graftwork.errors import RouteError
from graftwork.laws import stir
from graftwork.reference.technique import Technique
from graftwork.testing import tiny, tiny_batch

IN, OUT = 6, 5
WEIGHTS = torch.tensor([[0.3, 0.7], [-0.5, 1.5], [0.0, 0.0]], dtype=torch.float64)

TECHNIQUES = {
    "low-rank": gw.LoRA(rank=2),
    "low-rank of two ranks": gw.LoRA(rank=3),
    "taken from the base": gw.LoRA(rank=2, init="pissa"),
    "dense": gw.BitFit(),
    "answers": gw.LoHa(rank=2),
}
PAIRS = [(first, second) for first in TECHNIQUES for second in ("low-rank of two ranks", "dense")]
TECHNIQUES |= {"rescaling": gw.IA3(), "scaled and shifted": gw.SSF()}
PAIRS += [("rescaling", "rescaling"), ("rescaling", "scaled and shifted")]


def one_site(first: Technique, second: Technique) -> tuple[nn.Module, Tensor, Tensor, list[Tensor]]:
    """A host of one linear layer with two adapters: it, an input, y_0 and the two y_n."""
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(IN, OUT)).double()
    x, alone = torch.randn(3, 4, IN, dtype=torch.float64), []
    base = host(x).detach()
    for number, (name, technique) in enumerate((("a", first), ("b", second))):
        adapter = gw.attach(host, technique, name=name)
        stir(adapter, seed=number)
        with gw.active(host, name):
            alone.append(host(x).detach())
    return host.double(), x, base, alone


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_one_site_is_the_weighted_sum_of_changes(first: str, second: str) -> None:
    host, x, base, (a, b) = one_site(TECHNIQUES[first], TECHNIQUES[second])
    for weights in (WEIGHTS, WEIGHTS[:, None].expand(3, 4, 2), torch.randn(3, 4, 2, dtype=torch.float64)):
        wide = weights if weights.dim() == 3 else weights[:, None]
        wanted = base + wide[..., :1] * (a - base) + wide[..., 1:] * (b - base)
        with gw.route(host, ["a", "b"], weights=weights):
            torch.testing.assert_close(host(x).detach(), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("first", "second"), [PAIRS[0], PAIRS[1], PAIRS[-2]])
def test_gradients_reach_the_weights(first: str, second: str) -> None:
    host, x, base, (a, b) = one_site(TECHNIQUES[first], TECHNIQUES[second])
    weights, dy = WEIGHTS.clone().requires_grad_(), torch.randn_like(base)
    with gw.route(host, ["a", "b"], weights=weights):
        (found,) = torch.autograd.grad(host(x), weights, dy)
    wanted = torch.stack([(dy * (answer - base)).sum((1, 2)) for answer in (a, b)], dim=1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_layer_by_layer() -> None:
    """Weights of a layer that are 0 switch that layer's modules off."""
    model, batch = tiny("llama").eval(), tiny_batch("llama")
    stir(gw.attach(model, gw.LoRA(rank=2), name="a"))
    stir(gw.attach(model, gw.LoRA(rank=2, layers=[0]), name="first"))
    source = dict(gw.adapters(model)["a"].named_parameters())
    for name, tensor in gw.adapters(model)["first"].named_parameters():
        tensor.data.copy_(source[name])
    layers = model.config.num_hidden_layers
    weights = torch.zeros(3, 1, layers, 1)
    weights[:, :, 0] = 1.0
    with gw.route(model, ["a"], weights=weights):
        found = model(**batch).logits
    with gw.active(model, "first"):
        wanted = model(**batch).logits
    torch.testing.assert_close(found, wanted)
    with gw.route(model, ["a"], weights=weights[:, :, :1]), pytest.raises(RouteError, match="1 layers"):
        model(**batch)


def test_what_cannot_be_blended_is_refused_at_once() -> None:
    model = tiny("llama")
    gw.attach(model, gw.PromptTuning(length=2), name="prompt")
    gw.attach(model, gw.LoRA(rank=2), name="lora")
    with pytest.raises(RouteError, match="'prompt' works at the sequence port"):
        gw.route(model, ["lora", "prompt"], weights=torch.ones(3, 2))
    for weights, words in (
        (torch.ones(3, 3), r"\(batch, 1\)"),
        (torch.ones(3, dtype=torch.long), "floating point"),
        (torch.full((3, 1), float("nan")), "finite"),
    ):
        with pytest.raises(RouteError, match=words):
            gw.route(model, ["lora"], weights=weights)
    with pytest.raises(RouteError, match="names and one of index"):
        gw.route(model, ["lora"], torch.zeros(3, dtype=torch.long), weights=torch.ones(3, 1))


def test_a_blend_lives_through_recomputation() -> None:
    model, batch = tiny("llama").train(), tiny_batch("llama")
    stir(gw.attach(model, gw.LoRA(rank=2), name="a"))

    def gradient(recompute: bool) -> Tensor:
        if recompute:
            enable_checkpointing(model)
        weights = torch.tensor([[0.5], [1.0], [0.2]], requires_grad=True)
        with gw.route(model, ["a"], weights=weights):
            loss = model(**batch).logits.square().mean()
        loss.backward()
        assert weights.grad is not None
        return weights.grad

    wanted = gradient(False)
    torch.testing.assert_close(gradient(True), wanted)


@pytest.mark.slow
def test_one_graph_serves_every_weight() -> None:
    torch.compiler.reset()
    host, x, base, (a, b) = one_site(gw.LoRA(rank=2), gw.LoHa(rank=1))
    run = torch.compile(host, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        weights = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        wide = weights[:, None]
        with torch.no_grad(), gw.route(host, ["a", "b"], weights=weights):
            wanted = base + wide[..., :1] * (a - base) + wide[..., 1:] * (b - base)
            torch.testing.assert_close(run(x), wanted, atol=2e-6, rtol=1e-5)
