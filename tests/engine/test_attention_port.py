"""Attention port: prefixes as extra keys and values, against filled caches, peft, and each row alone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from grafting import answer, gap, grafted, prefix, prompt, real, routed, rows_of, stepwise, tokens, whole
from torch import nn

from graftwork.engine.attach import attach, detach
from graftwork.engine.verbs import active, route
from graftwork.errors import PortUnavailable, RouteError, StateError
from graftwork.testing import tiny, tiny_batch

FAMILIES = (
    "bert", "roberta", "distilbert", "electra", "modernbert", "gpt2", "gpt-neox", "opt", "llama", "mistral",
    "mixtral", "qwen3", "gemma3", "phi3", "t5", "bart", "whisper", "vit", "dinov2", "swin", "clip",
)  # fmt: skip
DECODERS = ("llama", "gpt2", "opt", "gpt-neox", "mistral", "mixtral", "qwen3", "gemma3", "phi3")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("name", FAMILIES)
def test_off_is_the_bare_model_and_routed_rows_are_each_adapter_alone(name):
    batch = tiny_batch(name)
    bare = tiny(name)
    for parameter in bare.parameters():
        parameter.requires_grad_(False)  # other kernels serve inputs that need gradients
    model = grafted(name, prefix)
    with active(model):
        assert torch.equal(answer(bare, batch), answer(model, batch))
    assert gap(answer(model, batch), answer(bare, batch)) > 0.01
    assert gap(routed(model, batch), rows_of(model, batch)) < 5e-6


@pytest.mark.parametrize(
    "name", ["llama", "bert", "gpt2", "t5", "vit", "swin", "gemma3", "bart", "modernbert"]
)
def test_eager_and_sdpa_agree_and_a_switch_after_attach_keeps_the_prefix(name):
    batch = tiny_batch(name)
    model = grafted(name, prefix)
    with active(model, "a", "b"):
        sdpa = answer(model, batch)
        model.set_attn_implementation("eager")
        assert gap(answer(model, batch), sdpa) < 5e-6
    with route(model, ["a", "b"], torch.tensor([0, 1, -1])):
        eager = answer(model, batch)
        model.set_attn_implementation("sdpa")
        assert gap(answer(model, batch), eager) < 5e-6


def _cache_of(model, name: str, batch: int):
    """The prefix of an adapter as the cache of a model that has seen its positions."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    prefixes = [m.grafts[name].attention for m in model.modules() if "grafts" in m._modules]
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    for layer, module in enumerate(prefixes):
        keys, values = (t.detach().unflatten(-1, (heads, -1)).transpose(0, 1) for t in module())
        cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)
    return cache


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gpt-neox"])
def test_a_prefix_equals_a_cache_filled_with_it(name):
    """Positions counted from 0 on both sides: the cache's own count would move them."""
    model = grafted(name, prefix)
    ids, _ = tokens()
    places = torch.arange(7).expand(3, -1)
    with torch.no_grad():
        with active(model, "a"):
            ours = model(input_ids=ids, use_cache=False).logits
        with active(model):
            cache = _cache_of(model, "a", 3)
            mask = torch.ones(3, 12, dtype=torch.long)
            theirs = model(
                input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache
            ).logits
    assert gap(ours, theirs) < 2e-6


def test_peft_prefix_tuning_is_a_prefix_with_positions_moved_by_its_length():
    peft = pytest.importorskip("peft")
    model = tiny("gpt2")
    adapter = attach(model, prefix(5), head=False)
    other = tiny("gpt2")
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, num_layers=2, num_attention_heads=4
    )
    theirs = peft.get_peft_model(other, config).eval()
    flat = theirs.prompt_encoder["default"].embedding.weight.data.normal_().unflatten(-1, (2, 2, 32))
    for layer, place in enumerate(adapter.placed):
        place.graft.module.key.data, place.graft.module.value.data = flat[:, layer, 0], flat[:, layer, 1]
    ids, _ = tokens()
    with torch.no_grad():
        ours = model(input_ids=ids, position_ids=torch.arange(5, 12).expand(3, -1)).logits
        assert torch.equal(ours, theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("who", ["a", "routed"])
def test_cached_chunked_and_static_generation_give_the_uncached_logits(name, who):
    from transformers import StaticCache

    model = grafted(name, prefix, factor=3.0)
    ids, left = tokens(length=10)
    choice = route(model, ["a", "b"], torch.tensor([0, 1, -1])) if who == "routed" else active(model, who)
    with torch.no_grad(), choice:
        for mask in (left, torch.ones_like(ids)):
            full = whole(model, ids, mask)
            assert gap(stepwise(model, ids, mask, 6, 1), full, mask) < 5e-5
            assert gap(stepwise(model, ids, mask, 4, 4), full, mask) < 5e-5
            static = StaticCache(config=model.config, max_cache_len=12)
            assert gap(stepwise(model, ids, mask, 6, 1, static), full, mask) < 5e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_routed_generation_and_beams_are_each_adapter_alone(name):
    model = grafted(name, prefix, factor=2.0)
    ids, mask = tokens()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {
        "num_beams": 2,
        "num_return_sequences": 2,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    with torch.no_grad():
        with route(model, ["a", "b"], torch.tensor([0, 1, -1])):
            together = model.generate(ids, attention_mask=mask, **options)
        for row, name_ in enumerate(("a", "b", None)):
            with active(model, *([name_] if name_ else [])):
                alone = model.generate(ids, attention_mask=mask, **options)
            mine = slice(2 * row, 2 * row + 2)
            assert torch.equal(alone.sequences[mine], together.sequences[mine])
            assert (alone.sequences_scores[mine] - together.sequences_scores[mine]).abs().max() < 1e-5


def test_a_padded_row_is_the_row_alone():
    model = grafted("llama", prefix)
    ids, mask = tokens()
    with torch.no_grad(), active(model, "a"):
        together = whole(model, ids, mask)[0, 3:]
        alone = model(input_ids=ids[:1, 3:], use_cache=False).logits[0]
    assert gap(together, alone) < 2e-6


def test_a_stack_of_prefixes_does_not_depend_on_their_order():
    model = grafted("bert", prefix)
    batch = tiny_batch("bert")
    with active(model, "a", "b"):
        first = answer(model, batch)
    with active(model, "b", "a"):
        assert gap(answer(model, batch), first) < 2e-6


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_route_left_before_backward_gives_the_same_gradients_under_checkpointing(name, reentrant):
    batch = tiny_batch(name)
    kept = _gradients(grafted(name, prefix), batch, None)
    recomputed = _gradients(grafted(name, prefix), batch, {"use_reentrant": reentrant})
    assert kept.keys() == recomputed.keys()
    for key, value in kept.items():
        assert gap(value, recomputed[key]) < 1e-5 * max(1.0, value.abs().max().item())


def _gradients(model: nn.Module, batch, checkpointing):
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if checkpointing is not None:
        model.activation_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    for adapter in ("a", "b"):
        for key, parameter in model.named_parameters():
            if f".grafts.{adapter}." in key:
                parameter.requires_grad_(True)
    with route(model, ["a", "b"], torch.tensor([0, 1, -1])):
        loss = (answer(model, batch) ** 2).mean()
    loss.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
def test_it_compiles_without_a_break(name):
    batch = tiny_batch(name)
    model = grafted(name, prefix)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        with active(model, "a"):
            assert gap(answer(compiled, batch), answer(model, batch)) < 1e-6
        with route(model, ["a", "b"], torch.tensor([0, 1, -1])):
            assert gap(answer(compiled, batch), answer(model, batch)) < 1e-6


def test_a_copy_and_a_saved_model_have_their_own_adapters():
    batch = tiny_batch("llama")
    model = grafted("llama", prefix)
    with torch.no_grad():
        before = answer(model, batch)
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        with active(model):
            assert gap(answer(twin, batch), before) == 0
            assert gap(answer(torch.load(file, weights_only=False), batch), before) == 0


def test_attention_maps_have_the_shapes_they_always_had():
    batch = tiny_batch("bert")
    model = grafted("bert", prefix)
    model.set_attn_implementation("eager")
    out = model(**batch, output_attentions=True)
    assert [tuple(map_.shape) for map_ in out.attentions] == [(3, 4, 7, 7)] * 2
    assert (out.attentions[0].sum(-1) < 0.999).any()


def test_the_config_is_never_written():
    model = grafted("llama", prefix)
    with active(model, "a"):
        model(**tiny_batch("llama"))
        attention = model.model.layers[0].self_attn
        assert attention.config is model.config
        assert model.config._attn_implementation == "sdpa"
        assert copy.deepcopy(model.config)._attn_implementation == "sdpa"


def test_detach_leaves_nothing():
    for name in ("t5", "llama"):
        model, batch = tiny(name), tiny_batch(name)
        classes = {path: type(module) for path, module in model.named_modules()}
        members = {path: set(module.__dict__) for path, module in model.named_modules()}
        keys, before = list(model.state_dict()), answer(model, batch)
        attach(model, prefix(4), head=False)
        answer(model, batch)
        detach(model)
        assert list(model.state_dict()) == keys
        assert {path: type(module) for path, module in model.named_modules()} == classes
        assert {path: set(module.__dict__) for path, module in model.named_modules()} == members
        assert torch.equal(answer(model, batch), before)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_half_precision_and_autocast(name):
    batch = tiny_batch(name)
    model = grafted(name, prefix)
    with torch.no_grad():
        exact = routed(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            assert gap(routed(model, batch).float(), exact) < 0.3
        low = routed(model.to(torch.bfloat16), batch)
    assert low.dtype == torch.bfloat16
    assert gap(low.float(), exact) < 0.3


def test_packed_sequences_each_see_the_prefix():
    model = grafted("llama", prefix)
    ids, _ = tokens(batch=1, length=8)
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    with torch.no_grad(), active(model, "a"):
        packed = model(input_ids=ids, position_ids=places, use_cache=False).logits
        assert gap(packed[:, 5:], model(input_ids=ids[:, 5:], use_cache=False).logits) < 5e-6


def test_a_prefix_and_a_prompt_serve_different_rows_of_one_batch():
    model = tiny("llama")
    ids, mask = tokens()
    for name, technique in (("a", prefix(5)), ("b", prompt(9))):
        for parameter in attach(model, technique, name=name, head=False).parameters():
            parameter.data.normal_()
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        assert gap(routed(model, batch), rows_of(model, batch)) < 2e-6


def test_a_prefix_stays_in_a_sliding_window():
    model = grafted("mistral", prefix)
    ids, _ = tokens(length=30, left=(0, 0, 0))
    model(input_ids=ids).logits[:, -1].sum().backward()
    pieces = [p for key, p in model.named_parameters() if ".grafts.b." in key]
    assert len(pieces) == 4
    assert all(piece.grad.abs().max() > 1e-6 for piece in pieces)


def test_flash_attention_is_given_a_mask_of_rows(monkeypatch):
    """Stands in for the kernel: reads (batch, keys), aligns causality at the last key, has no options."""
    from transformers import masking_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def kernel(module, query, key, value, mask, scaling=None, sliding_window=None, **_):
        assert module.config._attn_implementation == "flash_attention_2"
        q, k = query.shape[2], key.shape[2]
        seen = torch.ones(q, k, dtype=torch.bool).tril(k - q)
        seen = seen[None, None] if mask is None else seen & mask[:, None, None].bool()
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
        return out.transpose(1, 2), None

    model = grafted("llama", prefix)
    ids, mask = tokens()
    batch = {"input_ids": ids, "attention_mask": mask}
    plain = {"input_ids": ids}
    with torch.no_grad():
        expected, unmasked = routed(model, batch), rows_of(model, plain)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", kernel)
        monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
        assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]
        assert gap(real(routed(model, batch).nan_to_num(), batch), expected) < 2e-6
        assert gap(routed(model, plain), unmasked) < 2e-6


def test_reordered_upcast_attention_is_refused_with_eager_and_kept_with_sdpa():
    options = {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}
    with pytest.raises(PortUnavailable, match="reorder_and_upcast_attn"):
        attach(tiny("gpt2", options), prefix(3), head=False)
    model = tiny("gpt2", {"reorder_and_upcast_attn": True})
    attach(model, prefix(3), head=False)
    model(**tiny_batch("gpt2"))
    model.set_attn_implementation("eager")
    with pytest.raises(PortUnavailable, match="set_attn_implementation"):
        model(**tiny_batch("gpt2"))
    calls = []
    with active(model):
        for block in model.transformer.h:
            block.attn._upcast_and_reordered_attn = _counted(block.attn._upcast_and_reordered_attn, calls)
        model(**tiny_batch("gpt2"))
    assert len(calls) == 2


def _counted(function, calls):
    def run(*args):
        calls.append(1)
        return function(*args)

    return run


@pytest.mark.parametrize("name", ["deberta-v2", "bloom", "falcon", "mamba", "resnet"])
def test_models_without_the_interface_are_refused_with_the_reason(name):
    with pytest.raises(PortUnavailable, match="attention"):
        attach(tiny(name), prefix(3), head=False)


def test_what_cannot_be_routed_is_refused():
    model = grafted("llama", prefix)
    ids, _ = tokens()
    with (
        route(model, ["a"], torch.zeros(3, 7, dtype=torch.long)),
        pytest.raises(RouteError, match="per token"),
    ):
        model(input_ids=ids)
    with route(model, ["a"], torch.zeros(2, dtype=torch.long)), pytest.raises(RouteError, match=r"2 rows.*3"):
        model(input_ids=ids)


def test_a_prefix_of_another_width_is_refused():
    model = tiny("llama")
    adapter = attach(model, prefix(3), head=False)
    adapter.placed[0].graft.module.key.data = torch.zeros(3, 10)
    with pytest.raises(StateError, match="width"):
        model(**tiny_batch("llama"))


def test_flex_attention_and_paged_caches_are_refused():
    model = grafted("llama", prefix)
    ids, _ = tokens()
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(PortUnavailable, match="sdpa"):
        model.model.layers[0].self_attn(
            torch.zeros(1, 4, 32), position_embeddings=(torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
        )
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(PortUnavailable, match="paged"):
        model(input_ids=ids, cache=object())
