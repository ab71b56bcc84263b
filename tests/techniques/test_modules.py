"""Each module against its paper's formula, written out in float64."""

from __future__ import annotations

import dataclasses

import handmade as by_hand
import pytest
import torch
from handmade import LENGTH, NARROW, VOCABULARY, WIDE, WIDTH
from torch import Tensor, nn
from torch.nn import functional

from graftwork.engine.hidden import integrate
from graftwork.errors import BadOption, PortUnavailable
from graftwork.reference.catalogue import techniques
from graftwork.reference.site import Kind
from graftwork.reference.technique import Technique
from graftwork.techniques.bitfit import BitFit
from graftwork.techniques.bottleneck_adapter import BottleneckAdapter
from graftwork.techniques.compacter import Compacter
from graftwork.techniques.fine_tuning import FineTuning
from graftwork.techniques.ia3 import IA3
from graftwork.techniques.lora import LoRA
from graftwork.techniques.norm_tuning import NormTuning
from graftwork.techniques.p_tuning import PTuning
from graftwork.techniques.prefix_tuning import PrefixTuning
from graftwork.techniques.prompt_tuning import PromptTuning
from graftwork.techniques.ssf import SSF
from graftwork.techniques.tiny_attention_adapter import TinyAttentionAdapter

OWN = {name: kind for name, kind in techniques().items() if kind.__module__.startswith("graftwork.")}
DATA_PORTS = ("sequence", "attention")


def signal(*shape: int, seed: int = 3) -> Tensor:
    return by_hand.values(*shape, seed=seed).double()


HIDDEN = {name: kind for name, kind in OWN.items() if kind.published.port.value == "hidden"}
UNSHARED = {name: kind for name, kind in OWN.items() if kind.published.sharing == "none"}


def joined(technique: Technique, module: nn.Module, h: Tensor) -> Tensor:
    """The site's signal after a sequential hidden module."""
    return integrate(technique.card, h, module(h))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- formulas


@pytest.mark.parametrize(
    ("name", "f"), [("relu", torch.relu), ("tanh", torch.tanh), ("silu", functional.silu)]
)
def test_bottleneck(name: str, f: nn.Module) -> None:
    technique = BottleneckAdapter(width=NARROW, nonlinearity=name)  # type: ignore[arg-type]
    module = by_hand.jittered(by_hand.build_one(technique))
    h = signal(2, LENGTH, WIDTH)
    inner = f(torch.einsum("btc,rc->btr", h, module.down.weight) + module.down.bias)
    expected = h + torch.einsum("btr,cr->btc", inner, module.up.weight) + module.up.bias
    close(joined(technique, module, h), expected)


def test_parallel_bottleneck_reads_what_the_block_reads_and_is_scaled() -> None:
    technique = BottleneckAdapter.parallel(width=NARROW, scale=4.0)
    block = dataclasses.replace(by_hand.FEEDFORWARD, channels_in=8, channels_out=WIDTH, entry="up")
    module = by_hand.jittered(technique.build(block))
    x, y = signal(2, LENGTH, 8), signal(2, LENGTH, WIDTH, seed=4)
    inner = torch.relu(x @ module.down.weight.T + module.down.bias)
    close(integrate(technique.card, y, module(x)), y + 4 * (inner @ module.up.weight.T + module.up.bias))


def test_near_identity_is_a_cut_normal() -> None:
    module = by_hand.build_one(BottleneckAdapter.houlsby(width=64), by_hand.linear("attention", 512, 512))
    for weight in (module.down.weight, module.up.weight):
        assert weight.abs().max() <= 0.02
        assert 0.008 < weight.std() < 0.01
    assert not module.up.bias.any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_tiny_attention(causal: bool, heads: int) -> None:
    technique = TinyAttentionAdapter(width=2, heads=heads)
    site = dataclasses.replace(by_hand.ATTENTION_OUT, causal=causal)
    module = by_hand.jittered(technique.build(site))
    h = signal(2, LENGTH, WIDTH)
    n = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    q, k, v = (n @ part.weight.T for part in (module.query, module.key, module.value))
    answers = []
    for head in range(heads):
        own = slice(2 * head, 2 * head + 2)
        scores = torch.einsum("bqw,bkw->bqk", q[..., own], k[..., own]) / 2**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), float("-inf"))
        answers.append(scores.softmax(-1) @ v[..., own])
    close(joined(technique, module, h), h + torch.cat(answers, -1) @ module.output.weight.T)


def test_tiny_attention_looks_back_only_where_its_stack_does() -> None:
    h = signal(1, LENGTH, WIDTH)
    changed = h.clone()
    changed[0, -1] += signal(WIDTH, seed=8)
    for causal in (False, True):
        site = dataclasses.replace(by_hand.ATTENTION_OUT, causal=causal)
        module = by_hand.jittered(TinyAttentionAdapter().build(site))
        assert torch.allclose(module(h)[0, 0], module(changed)[0, 0]) is causal


def test_tiny_attention_takes_any_number_of_position_axes_but_not_none() -> None:
    module = by_hand.jittered(by_hand.build_one(TinyAttentionAdapter(), by_hand.ATTENTION_OUT))
    grid = signal(2, 3, 4, WIDTH)
    close(module(grid), module(grid.flatten(1, 2)).unflatten(1, (3, 4)))
    with pytest.raises(PortUnavailable, match="no positions"):
        module(signal(2, WIDTH))


def test_compacter_is_a_sum_of_kronecker_products() -> None:
    technique = Compacter(width=8)
    module = by_hand.jittered(by_hand.build_one(technique))
    rule = module.shared["rule"]

    def matrix(layer: nn.Module) -> Tensor:
        terms = zip(rule, layer.left, layer.right, strict=True)
        return sum(torch.kron(a, left @ right) for a, left, right in terms)  # type: ignore[return-value]

    h = signal(2, LENGTH, WIDTH)
    inner = functional.gelu(h @ matrix(module.down).T + module.down.bias)
    close(joined(technique, module, h), h + inner @ matrix(module.up).T + module.up.bias)
    assert matrix(module.down).shape == (8, WIDTH)
    assert matrix(module.up).shape == (WIDTH, 8)


def test_compacter_refuses_widths_that_its_order_does_not_divide() -> None:
    with pytest.raises(BadOption, match=r"order=4 must divide.*0/feedforward"):
        Compacter().build(by_hand.linear("feedforward", 18, 16))


def test_rescaling_techniques() -> None:
    h = signal(2, LENGTH, WIDTH)
    ia3 = by_hand.jittered(by_hand.build_one(IA3()))
    close(joined(IA3(), ia3, h), torch.einsum("c,btc->btc", ia3.scale, h))
    ssf = by_hand.jittered(by_hand.build_one(SSF()))
    close(joined(SSF(), ssf, h), torch.einsum("c,btc->btc", ssf.scale, h) + ssf.shift)


def test_rescaling_folds_into_the_weight_in_front_or_behind() -> None:
    weight, x = signal(WIDTH, WIDTH, seed=5), signal(2, LENGTH, WIDTH)
    vector = by_hand.jittered(by_hand.build_one(IA3())).scale
    close((x @ weight.T) * vector, x @ (torch.diag(vector) @ weight).T)
    close((x * vector) @ weight.T, x @ (weight @ torch.diag(vector)).T)


def test_ia3_covers_the_inner_activation() -> None:
    assert IA3().build(by_hand.INNER).scale.shape == (WIDE,)


def test_lora_delta_and_toy_values() -> None:
    module = LoRA(rank=1, alpha=2.0).build(by_hand.linear("attention.query", 2, 2))
    with torch.no_grad():
        module.down.copy_(torch.tensor([[1.0, 2.0]]))
        module.up.copy_(torch.tensor([[0.5], [-1.0]]))
    assert module.delta().tolist() == [[1.0, 2.0], [-2.0, -4.0]]
    host = torch.diag(torch.tensor([3.0, 4.0]))
    assert (module.effective(host, host) @ torch.tensor([1.0, -1.0])).tolist() == [2.0, -2.0]
    assert LoRA(rank=16, alpha=32).scale == 2
    assert LoRA(rank=16, alpha=32, stabilised=True).scale == 8


@pytest.mark.parametrize("kind", [Kind.NORM, Kind.BLOCK])
def test_lora_needs_a_matrix(kind: Kind) -> None:
    assert LoRA().fits(by_hand.QUERY)
    assert not LoRA().fits(dataclasses.replace(by_hand.QUERY, kind=kind))
    assert not LoRA().fits(by_hand.INNER)


def test_bitfit_changes_the_bias_only() -> None:
    module = by_hand.jittered(by_hand.build_one(BitFit()))
    weight, bias = signal(WIDTH, WIDTH), signal(WIDTH)
    assert module.effective(weight, weight) is weight
    close(module.effective_bias(bias, bias), bias + module.delta)


def test_bitfit_fits_where_a_bias_is() -> None:
    assert BitFit().fits(by_hand.QUERY)
    assert BitFit().fits(by_hand.NORM)
    assert not BitFit().fits(by_hand.BIASLESS)
    assert not BitFit().fits(dataclasses.replace(by_hand.FEEDFORWARD, entry="up"))
    head = dataclasses.replace(by_hand.QUERY, workspace="head")  # trained whole with every adapter
    assert not BitFit().fits(head)
    assert BitFit(workspaces=("head",)).fits(head)


@pytest.mark.parametrize(
    "site",
    [by_hand.QUERY, by_hand.NORM, by_hand.EMBEDDING, by_hand.EXPERTS, by_hand.BIASLESS],
    ids=lambda s: s.key,
)
def test_fine_tuning_starts_as_the_host_and_then_replaces_it(site: by_hand.Site) -> None:
    module = by_hand.build_one(FineTuning(), site)
    host = site.matrix()
    assert module.weight.shape == (site.shape[::-1] if site.kind is Kind.EMBEDDING else site.shape)
    assert torch.equal(module.effective(host, host), host)
    assert module.weight.data_ptr() != host.data_ptr()
    with torch.no_grad():
        module.weight.add_(1)
    assert torch.equal(module.effective(host, host), host + 1)
    torch.testing.assert_close(module.effective(2 * host, host), 2 * host + 1)
    assert (module.bias is None) is (not site.has_bias)
    bias = torch.zeros(site.width_out) if module.bias is None else site.bias()
    assert torch.equal(module.effective_bias(bias, bias), bias)


def test_fine_tuning_owns_its_memory_whatever_it_reads() -> None:
    stored = by_hand.values(WIDTH, WIDTH)
    site = dataclasses.replace(by_hand.BIASLESS, matrix=lambda: stored.mT)
    module = FineTuning().build(site)
    assert module.weight.is_contiguous()
    assert torch.equal(module.weight, stored.mT)
    with pytest.raises(PortUnavailable, match=r"0/attention.query"):
        FineTuning().build(dataclasses.replace(site, matrix=None))


def test_fine_tuning_takes_whole_parameters_unless_told_otherwise() -> None:
    part = dataclasses.replace(by_hand.QUERY, channels=(0, WIDTH))
    assert FineTuning().fits(by_hand.QUERY)
    assert not FineTuning().fits(part)
    assert FineTuning(workspaces=("attention.query",)).fits(part)
    assert not FineTuning().fits(by_hand.INNER)


def test_norm_tuning_trains_gain_and_bias_of_norms_only() -> None:
    module = by_hand.jittered(by_hand.build_one(NormTuning(), by_hand.NORM))
    assert module.weight.shape == module.bias.shape == (WIDTH,)
    gain = signal(WIDTH)
    close(module.effective(gain, gain), module.weight)
    assert not NormTuning().fits(by_hand.QUERY)


def test_learning_rate_groups() -> None:
    assert LoRA(up_rate=16.0).learning_rates() == {"up": 16.0}
    assert FineTuning(rate=0.1).learning_rates() == {"weight": 0.1, "bias": 0.1}
    assert FineTuning().learning_rates() == LoRA().learning_rates() == {}


# --- prompts and prefixes


def test_prompt_starts_with_the_spread_of_the_vocabulary_or_its_rows() -> None:
    torch.manual_seed(0)
    table = by_hand.STACK.matrix()
    noise = PromptTuning(length=400).build(by_hand.STACK)()
    assert noise.shape == (400, WIDTH)
    assert abs(noise.std() / table.std() - 1) < 0.05
    rows = PromptTuning(length=9, init="vocabulary").build(by_hand.STACK)()
    assert all(any(torch.equal(row, table[:, word]) for word in range(VOCABULARY)) for row in rows)
    tableless = dataclasses.replace(by_hand.STACK, matrix=None)
    assert abs(PromptTuning(length=400).build(tableless)().std() - 0.02) < 0.001
    with pytest.raises(BadOption, match="no vocabulary"):
        PromptTuning(init="vocabulary").build(tableless)


def test_p_tuning_mlp() -> None:
    module = by_hand.jittered(by_hand.build_one(PTuning(length=LENGTH, hidden=7)))
    first, second, third = (layer for layer in module.mlp if isinstance(layer, nn.Linear))
    inner = torch.relu(module.embedding @ first.weight.T + first.bias)
    inner = torch.relu(inner @ second.weight.T + second.bias)
    close(module(), inner @ third.weight.T + third.bias)


def test_p_tuning_lstm_reads_the_positions_in_both_directions() -> None:
    module = by_hand.jittered(by_hand.build_one(PTuning(length=LENGTH, encoder="lstm")), size=0.3)
    before = module()
    assert before.shape == (LENGTH, WIDTH)
    with torch.no_grad():
        module.embedding[2] += 1
    assert (module() - before).abs().amax(-1).gt(1e-6).all()


@pytest.mark.parametrize(
    "technique",
    [PTuning(length=LENGTH), PTuning(length=LENGTH, encoder="lstm"), PrefixTuning(length=LENGTH, hidden=8)],
    ids=repr,
)
def test_what_is_stored_answers_like_what_was_trained(technique: Technique) -> None:
    trained = by_hand.jittered(by_hand.build_one(technique), size=0.3)
    stored = by_hand.build_one(technique.stored()).double()
    tensors = trained.stored_tensors()
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in tensors.values())
    stored.load_state_dict(tensors, strict=True)
    torch.testing.assert_close(stored(), trained())
    assert technique.stored().stored() == technique.stored()


def test_prefix_mlp() -> None:
    one, two = by_hand.build(PrefixTuning(length=LENGTH, hidden=8), [by_hand.ATTENTION] * 2)
    by_hand.jittered(nn.ModuleList([one, two]))
    trunk = one.shared
    inner = torch.tanh(trunk.embedding @ trunk.first.weight.T + trunk.first.bias)
    written = inner @ two.last.weight.T + two.last.bias
    key, value = two()
    close(key, written[:, :WIDTH])
    close(value, written[:, WIDTH:])
    assert PrefixTuning(hidden=None).card.sharing == "none"
    assert PrefixTuning().card.sharing == "tied"


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v


def test_concatenated_keys_are_a_gated_addition() -> None:
    key, value = by_hand.jittered(by_hand.build_one(PrefixTuning(length=LENGTH, hidden=None)))()
    q, k, v = (signal(11, WIDTH, seed=seed) for seed in (1, 2, 3))
    width = WIDTH // 2
    for own in (slice(0, width), slice(width, WIDTH)):
        own_q, scale = q[:, own], width**0.5
        on_prefix = (own_q @ key[:, own].T / scale).exp().sum(-1, keepdim=True)
        on_text = (own_q @ k[:, own].T / scale).exp().sum(-1, keepdim=True)
        gate = on_prefix / (on_prefix + on_text)
        prefixed, plain = attend(own_q, key[:, own], value[:, own]), attend(own_q, k[:, own], v[:, own])
        both = attend(own_q, torch.cat([key[:, own], k[:, own]]), torch.cat([value[:, own], v[:, own]]))
        close(both, (1 - gate) * plain + gate * prefixed)


def test_order_matters_to_prompts_and_not_to_prefixes() -> None:
    key, value = by_hand.jittered(by_hand.build_one(PrefixTuning(length=LENGTH, hidden=None)))()
    q, order = signal(11, WIDTH), torch.tensor([3, 1, 4, 0, 2])
    close(attend(q, key, value), attend(q, key[order], value[order]))
    prompt = by_hand.jittered(by_hand.build_one(PromptTuning(length=LENGTH)))()
    positions = signal(LENGTH, WIDTH, seed=9)  # a model with positions adds one to each slot
    first, second = prompt + positions, prompt[order] + positions
    assert (attend(q, first, first) - attend(q, second, second)).abs().max() > 1e-3


# --- laws over all techniques


def effect(technique: Technique, module: nn.Module, dtype: torch.dtype) -> Tensor:
    """What a freshly built module changes at its hand-made site (zero: nothing)."""
    port = technique.card.port.value
    if port == "hidden":
        h = signal(2, LENGTH, WIDTH).to(dtype)
        return joined(technique, module, h) - h
    site = by_hand.HOMES[port]
    weight, bias = site.matrix().to(dtype), site.bias().to(dtype)
    new = module.effective(weight, weight), module.effective_bias(bias, bias)
    assert all(tensor.dtype is dtype for tensor in new)
    return torch.cat([(new[0] - weight).flatten(), new[1] - bias])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OWN.values(), ids=OWN)
def test_starts_as_its_card_says(kind: type[Technique], dtype: torch.dtype) -> None:
    technique = by_hand.smallest(kind)
    module = by_hand.build_one(technique)
    if technique.card.port.value in DATA_PORTS:
        assert not technique.card.identity_at_init  # extra positions always draw attention
    else:
        rounding = 16 * torch.finfo(dtype).eps
        change = effect(technique, module, dtype).abs().max()
        assert technique.card.identity_at_init is bool(change <= rounding)


def test_near_identity_is_not_the_identity() -> None:
    technique = BottleneckAdapter.houlsby()
    change = effect(technique, by_hand.build_one(technique), torch.float32)
    assert not technique.card.identity_at_init
    assert 0 < change.abs().max() < 1e-2


@pytest.mark.parametrize("kind", HIDDEN.values(), ids=HIDDEN)
def test_low_precision_signals_get_low_precision_answers(kind: type[Technique]) -> None:
    module = by_hand.build_one(by_hand.smallest(kind))
    h = signal(2, LENGTH, WIDTH).to(torch.bfloat16)
    answer = module(h)
    answers = answer if isinstance(answer, tuple) else (answer,)
    assert all(z.dtype is torch.bfloat16 for z in answers)
    assert all(tensor.dtype is torch.float32 for tensor in module.parameters())
    assert torch.broadcast_shapes(answers[0].shape, h.shape) == h.shape


@pytest.mark.parametrize("kind", OWN.values(), ids=OWN)
def test_every_tensor_learns(kind: type[Technique]) -> None:
    """With random tensors each one has a gradient that is not zero."""
    technique = by_hand.smallest(kind)
    module = by_hand.jittered(by_hand.build_one(technique), size=0.5)
    if getattr(module, "hinted", False):
        pytest.skip("reads hints of each row; see test_query_prompt.py")
    if technique.card.port.value in DATA_PORTS:
        answer = module()
        answer = torch.cat([part.flatten() for part in answer]) if isinstance(answer, tuple) else answer
    else:
        answer = effect(technique, module, torch.float64)
    answer.pow(2).sum().backward()
    gradients = {name: tensor.grad for name, tensor in module.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]


@pytest.mark.parametrize("kind", HIDDEN.values(), ids=HIDDEN)
def test_token_wise_means_token_by_token(kind: type[Technique]) -> None:
    technique = by_hand.smallest(kind)
    module = by_hand.jittered(by_hand.build_one(technique))
    h = signal(1, LENGTH, WIDTH)
    whole = joined(technique, module, h)
    alone = torch.cat([joined(technique, module, h[:, t : t + 1]) for t in range(LENGTH)], 1)
    assert technique.card.token_wise is torch.allclose(whole, alone)


def test_compacters_share_their_rules_and_nothing_else() -> None:
    modules = by_hand.build(Compacter(width=4), [by_hand.ATTENTION_OUT, by_hand.FEEDFORWARD])
    assert len({module.shared["rule"].data_ptr() for module in modules}) == 1
    own = [t.data_ptr() for m in modules for n, t in m.named_parameters() if not n.startswith("shared.")]
    assert len(own) == len(set(own)) == 2 * 6
    assert {n for n in modules[0].state_dict() if n.startswith("shared.")} == {"shared.rule"}


@pytest.mark.parametrize("kind", UNSHARED.values(), ids=UNSHARED)
def test_the_others_share_nothing(kind: type[Technique]) -> None:
    home = by_hand.HOMES[kind().card.port.value]
    technique = by_hand.smallest(kind)
    modules = by_hand.build(technique, [home, home])
    tensors = [tensor.data_ptr() for module in modules for tensor in module.parameters()]
    shared = technique.shared([home, home])
    assert shared is None or not list(shared.parameters())
    assert len(tensors) == len(set(tensors))


def test_additive_deltas_commute_and_nonlinear_adapters_do_not() -> None:
    one, two = (by_hand.jittered(LoRA(rank=4).build(by_hand.QUERY), seed) for seed in (1, 2))
    host = signal(WIDTH, WIDTH)
    close(one.effective(two.effective(host, host), host), two.effective(one.effective(host, host), host))
    technique = BottleneckAdapter(width=NARROW)
    first, second = (by_hand.jittered(by_hand.build_one(technique), seed) for seed in (1, 2))
    h = signal(2, LENGTH, WIDTH)
    ahead = joined(technique, second, joined(technique, first, h))
    behind = joined(technique, first, joined(technique, second, h))
    assert (ahead - behind).abs().max() > 1e-3
