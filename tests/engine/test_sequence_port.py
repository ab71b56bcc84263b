"""Sequence port: prompts put in before a stack, against concatenation by hand, peft, and each row alone."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from grafting import answer, gap, grafted, prompt, real, routed, rows_of, stepwise, tokens, whole
from torch import Tensor, nn

from graftwork.engine.attach import attach, detach
from graftwork.engine.modules import PromptModule
from graftwork.engine.sequence_layout import Layout, leading
from graftwork.engine.verbs import active, route
from graftwork.errors import GraftworkError, PortUnavailable, RouteError, StateError
from graftwork.reference.card import Card
from graftwork.reference.site import Site
from graftwork.reference.technique import Technique
from graftwork.techniques.prompt_tuning import PromptTuning
from graftwork.testing import tiny, tiny_batch

FAMILIES = (
    "bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert", "deberta-v2", "gpt2", "opt",
    "gpt-neox", "bloom", "falcon", "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2",
    "gemma3", "phi3", "t5", "t5:decoder", "mt5", "bart", "bart:decoder", "whisper:decoder", "vit", "dinov2",
    "clip:vision", "mamba", "mamba2",
)  # fmt: skip
DECODERS = (
    "llama",
    "gpt2",
    "opt",
    "gpt-neox",
    "mixtral",
    "qwen3",
    "gemma",
    "phi3",
    "mistral",
    "gemma3",
    "falcon",
)
SLIDING = ("mistral", "gemma3", "falcon")  # falcon's bare model refuses static caches


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def prompted(name: str, **options):
    family, _, stack = name.partition(":")
    where = {"workspaces": (f"{stack}.embedding",)} if stack else {}
    return family, grafted(family, prompt, **options, **where)


@dataclass(frozen=True, kw_only=True)
class DeepPrompt(Technique):
    """A prompt at every layer."""

    published: ClassVar[Card] = PromptTuning.published
    length: int = 5

    def build(self, site: Site) -> nn.Module:
        return _Positions(self.length, site.channels_in)


class _Positions(PromptModule):
    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(length, width))

    def forward(self) -> Tensor:
        return self.prompt


def deep(length: int) -> DeepPrompt:
    return DeepPrompt(length=length, workspaces=("layer",))


# ---- layouts


@pytest.mark.parametrize("front", [True, False])
def test_a_layout_is_what_the_words_say(front):
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    layout = Layout(3, leading(mask, 1), torch.tensor([3, 1, 0]), front)
    own = torch.arange(1, 13).view(3, 4)
    slots = -torch.arange(1, 10).view(3, 3)
    merged = layout.merge(slots, own)
    for row in range(3):
        start, count = [3, 1, 1][row], [3, 1, 0][row]
        mine, filler = slots[row, :count].tolist(), slots[row, count:].tolist()
        before, rest = own[row, :start].tolist(), own[row, start:].tolist()
        expected = [*filler, *before, *mine, *rest] if front else [*before, *mine, *filler, *rest]
        assert merged[row].tolist() == expected
    assert torch.equal(layout.take(merged), own)


# ---- every family


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_stay_and_routed_rows_are_each_adapter_alone(name):
    family, model = prompted(name)
    batch, bare = tiny_batch(family), tiny(family)
    for parameter in bare.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        with active(model):
            assert torch.equal(answer(model, batch), answer(bare, batch))
        with active(model, "a"):
            changed = answer(model, batch)
            assert changed.shape == answer(bare, batch).shape
            assert gap(changed, answer(bare, batch)) > 0.01
        assert gap(routed(model, batch), rows_of(model, batch)) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "opt",
        "qwen3",
        "mistral",
        "gemma3",
        "bloom",
        "falcon",
        "mamba",
        "bert",
        "roberta",
        "deberta-v2",
    ],
)
def test_a_padded_row_is_the_row_alone_on_both_sides(name):
    model = grafted(name, prompt)
    ids = torch.randint(3, 99, (2, 7))
    gaps = [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]
    for gap_ in (
        gaps if name not in ("bert", "deberta-v2") else gaps[1:]
    ):  # they count positions from the first pad
        mask = torch.tensor([gap_, [1] * 7])
        kept = mask[0].bool()
        padded = ids.where(mask.bool(), 1 if name == "roberta" else 0)
        padded, pad = (padded.where(mask.bool(), model.config.pad_token_id or 0), mask)
        with torch.no_grad(), active(model, "a"):
            together = model(input_ids=padded, attention_mask=pad).logits[0, kept]
            alone = model(input_ids=ids[:1, kept]).logits[0]
        assert gap(together, alone) < 5e-6


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "opt", "gemma3", "bloom", "falcon", "mamba", "mixtral", "qwen3"]
)
def test_it_is_concatenation_in_front_of_the_embeddings(name):
    model = grafted(name, prompt)
    ids, _ = tokens()
    piece = next(p for key, p in model.named_parameters() if ".grafts.a." in key)
    embeds = torch.cat([piece.expand(3, -1, -1), model.get_input_embeddings()(ids)], 1)
    with torch.no_grad():
        with active(model, "a"):
            ours = model(input_ids=ids).logits
        with active(model):
            assert gap(ours, model(inputs_embeds=embeds).logits[:, 5:]) < 2e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_peft_prompt_tuning_gives_the_same_without_padding(name):
    peft = pytest.importorskip("peft")
    task = {"bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}.get(name, "CAUSAL_LM")
    kind = "bert-base" if name == "bert" else name
    model, other = tiny(kind), tiny(kind)
    adapter = attach(model, PromptTuning(length=5), head=False)
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=5, num_transformer_submodules=1)
    theirs = peft.get_peft_model(other, config).eval()
    piece = adapter.placed[0].graft.module.prompt
    piece.data = theirs.prompt_encoder["default"].embedding.weight.data.normal_()
    batch = tiny_batch(kind, padding=False)
    with torch.no_grad():
        peers = theirs(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
        if name == "bert":  # the peer puts the prompt in front of CLS, where the pooler looks
            embeds = model.embeddings.word_embeddings(batch["input_ids"])
            embeds = torch.cat([embeds[:, :1], piece.expand(3, -1, -1), embeds[:, 1:]], 1)
            with active(model):
                by_hand = model(inputs_embeds=embeds).last_hidden_state
            by_hand = torch.cat([by_hand[:, :1], by_hand[:, 6:]], 1)
            assert gap(model(**batch).last_hidden_state, by_hand) < 1e-6
        elif name == "t5":
            assert gap(model(**batch).logits, peers.logits) < 5e-6
        else:
            assert gap(model(**batch).logits, peers.logits[:, 5:]) < 1e-6


# ---- what heads and callers see


@pytest.mark.parametrize("name", ["llama-classification", "gpt2-classification", "modernbert-classification"])
def test_heads_that_pool_see_the_row_alone(name):
    model = grafted(name, prompt, {"num_labels": 3})
    ids = torch.randint(3, 99, (2, 7))
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
    padded = ids.where(mask.bool(), 0)
    with torch.no_grad(), active(model, "a"):
        together = model(input_ids=padded, attention_mask=mask).logits[0]
        assert gap(together, model(input_ids=ids[:1, :5]).logits[0]) < 2e-6


@pytest.mark.parametrize("name", ["bert-base", "roberta-base"])
def test_the_pooler_reads_the_first_position_of_the_row(name):
    model = grafted(name, prompt)
    batch = tiny_batch(name)
    with torch.no_grad(), route(model, ["a", "b"], torch.tensor([0, 1, -1])):
        out = model(**batch)
        assert gap(out.pooler_output, model.pooler(out.last_hidden_state)) < 1e-6


@pytest.mark.parametrize(
    "name", ["bert", "llama", "gpt2", "vit", "mixtral", "mamba", "dinov2", "clip:vision"]
)
@pytest.mark.parametrize("asked_before", [True, False])
def test_recorded_states_and_maps_have_the_shapes_they_always_had(name, asked_before):
    family, _, stack = name.partition(":")
    bare, batch = tiny(family), tiny_batch(family)
    wanted = {"output_hidden_states": True}
    if name != "mamba":
        bare.set_attn_implementation("eager")
        wanted["output_attentions"] = True
    wanted |= {"output_router_logits": True} if name == "mixtral" else {}
    expected = _shapes(bare(**batch, **wanted))
    model = tiny(family)
    if name != "mamba":
        model.set_attn_implementation("eager")
    if asked_before:
        model(**batch, **wanted)
    attach(model, prompt(4, **({"workspaces": (f"{stack}.embedding",)} if stack else {})), head=False)
    assert _shapes(model(**batch, **wanted)) == expected


def _shapes(out) -> dict[str, object]:
    if isinstance(out, Tensor):
        return tuple(out.shape)
    if isinstance(out, dict):
        return {
            key: _shapes(value)
            for key, value in out.items()
            if key not in ("past_key_values", "cache_params")
        }
    return [_shapes(value) for value in out] if isinstance(out, tuple | list) else None


def test_recorded_maps_of_a_decoding_step_have_no_slots():
    model = grafted("llama", prompt)
    model.set_attn_implementation("eager")
    ids, _ = tokens()
    cache = model(input_ids=ids, use_cache=True).past_key_values
    out = model(input_ids=ids[:, :1], past_key_values=cache, output_attentions=True)
    assert {tuple(map_.shape) for map_ in out.attentions} == {(3, 4, 1, 8)}


def test_tuples_and_positional_calls():
    model = grafted("llama", prompt)
    ids, mask = tokens()
    with torch.no_grad():
        named = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(model.model(ids, mask)[0], named)
        assert torch.equal(model.model(ids, mask, return_dict=False)[0], named)
        assert isinstance(model(ids, mask, return_dict=False), tuple)


# ---- caches and generation


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("who", ["a", "routed"])
def test_cached_chunked_and_static_generation_give_the_uncached_logits(name, who):
    from transformers import StaticCache

    model = grafted(name, prompt, factor=3.0)
    ids, left = tokens(length=10)
    choice = route(model, ["a", "b"], torch.tensor([0, 1, -1])) if who == "routed" else active(model, who)
    with torch.no_grad(), choice:
        for mask in (left, torch.ones_like(ids)):
            full = whole(model, ids, mask)
            assert gap(stepwise(model, ids, mask, 6, 1), full, mask) < 5e-5
            assert gap(stepwise(model, ids, mask, 4, 4), full, mask) < 5e-5
            if name not in SLIDING:
                static = StaticCache(config=model.config, max_cache_len=12)
                assert gap(stepwise(model, ids, mask, 6, 1, static), full, mask) < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "bloom", "t5", "t5:decoder", "bart", "bart:decoder", "mamba"]
)
def test_routed_generation_and_beams_are_each_adapter_alone(name):
    family, model = prompted(name, factor=2.0)
    ids, mask = tokens()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    beams = {"output_scores": True, "return_dict_in_generate": True}
    beams |= {"num_beams": 2, "num_return_sequences": 2} if family != "mamba" else {}
    with torch.no_grad():
        with route(model, ["a", "b"], torch.tensor([0, 1, -1])):
            together = model.generate(ids, attention_mask=mask, **options, **beams)
            uncached = model.generate(ids, attention_mask=mask, **options, **beams, use_cache=False)
            assert torch.equal(together.sequences, uncached.sequences)
        for row, who in enumerate(("a", "b", None)):
            with active(model, *([who] if who else [])):
                alone = model.generate(ids, attention_mask=mask, **options, **beams)
            each = 2 if family != "mamba" else 1
            mine = slice(each * row, each * row + each)
            assert torch.equal(alone.sequences[mine], together.sequences[mine])
            assert (
                max(gap(x[mine], y[mine]) for x, y in zip(alone.scores, together.scores, strict=True)) < 1e-4
            )


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_state_space_model_continues_rows_of_different_prompts(name):
    model = grafted(name, prompt, factor=2.0)
    ids, mask = tokens(length=9)
    with torch.no_grad(), route(model, ["a", "b"], torch.tensor([0, 1, -1])):
        full = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        out = model(input_ids=ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
        steps = [out.logits]
        for i in range(6, 9):
            out = model(input_ids=ids[:, i : i + 1], cache_params=out.cache_params, use_cache=True)
            steps.append(out.logits)
    assert gap(torch.cat(steps, 1), full, mask) < 5e-5


def test_generate_continues_its_cache_and_looks_up_candidates():
    model = grafted("llama", prompt, factor=3.0)
    ids, mask = tokens(left=(2, 0, 1))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    options["output_logits"] = True
    with torch.no_grad(), active(model, "a"):
        once = model.generate(ids, attention_mask=mask, max_new_tokens=6, **options)
        first = model.generate(ids, attention_mask=mask, max_new_tokens=3, **options)
        longer = torch.cat([mask, torch.ones(3, 3, dtype=mask.dtype)], 1)
        cache = first.past_key_values
        second = model.generate(
            first.sequences, attention_mask=longer, past_key_values=cache, max_new_tokens=3, **options
        )
        assert torch.equal(once.sequences, second.sequences)
        assert max(gap(x, y) for x, y in zip(once.logits[3:], second.logits, strict=True)) < 5e-5
        chunked = model.generate(ids, attention_mask=mask, max_new_tokens=6, prefill_chunk_size=3, **options)
        assert max(gap(x, y) for x, y in zip(once.logits, chunked.logits, strict=True)) < 5e-5
        static = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, cache_implementation="static", **options
        )
        assert max(gap(x, y) for x, y in zip(once.logits, static.logits, strict=True)) < 5e-5
        guided = model.generate(
            ids[1:2], attention_mask=mask[1:2], max_new_tokens=6, prompt_lookup_num_tokens=2
        )
        assert torch.equal(guided[:, :13], once.sequences[1:2, : guided.shape[1]])


def test_the_cache_speaks_of_own_positions_and_keeps_its_prompt():
    model = grafted("llama", prompt)
    ids, _ = tokens()
    with torch.no_grad():
        with active(model, "a"):
            full = model(input_ids=ids, use_cache=False).logits
            cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        assert cache.get_seq_length() == 5
        assert cache.layers[0].keys.shape[2] == 10
        twin = copy.deepcopy(cache)
        with active(model, "b"):  # what is in the cache decides
            assert gap(model(input_ids=ids[:, 5:], past_key_values=cache).logits, full[:, 5:]) < 5e-6
        assert gap(model(input_ids=ids[:, 5:], past_key_values=twin).logits, full[:, 5:]) < 5e-6


def test_a_cache_filled_without_the_prompt_is_refused():
    model = grafted("llama", prompt)
    ids, _ = tokens()
    with active(model):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with (
        active(model, "a"),
        pytest.raises(StateError, match="was filled without prompt 'a'; start with an empty"),
    ):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_a_static_sliding_window_cache_is_refused():
    from transformers import StaticCache

    model = grafted("gemma3", prompt)
    ids, _ = tokens()
    cache = StaticCache(config=model.config, max_cache_len=12)
    with active(model, "a"), pytest.raises(PortUnavailable, match="use the dynamic cache"):
        model(input_ids=ids, past_key_values=cache)


# ---- encoder-decoders


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_sees_the_prompt_of_its_encoder(name):
    model = grafted(name, prompt)
    batch = tiny_batch(name, padding=False)
    piece = next(p for key, p in model.named_parameters() if ".grafts.a." in key)
    with torch.no_grad():
        embeds = model.get_encoder().get_input_embeddings()(batch["input_ids"])
        embeds = torch.cat([piece.expand(3, -1, -1), embeds], 1)
        with active(model):
            by_hand = model(inputs_embeds=embeds, decoder_input_ids=batch["decoder_input_ids"]).logits
        with active(model, "a"):
            assert gap(model(**batch).logits, by_hand) < 5e-6


def test_an_output_encoded_under_another_prompt_is_refused():
    model = grafted("t5", prompt)
    batch = tiny_batch("t5")
    with active(model, "a"):
        encoded = model.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with active(model, "b"), pytest.raises(StateError, match="encoded under another prompt"):
        model(
            encoder_outputs=encoded,
            attention_mask=batch["attention_mask"],
            decoder_input_ids=batch["input_ids"],
        )


# ---- deep prompts


DEEP = (
    "bert",
    "roberta",
    "modernbert",
    "deberta-v2",
    "distilbert",
    "gpt2",
    "llama",
    "gemma3",
    "vit",
    "dinov2",
    "clip",
)


@pytest.mark.parametrize("name", DEEP)
def test_deep_prompts_are_routed_and_give_every_layer_a_gradient(name):
    where = ("vision.layer",) if name == "clip" else ("layer",)
    model = grafted(name, lambda length: DeepPrompt(length=length, workspaces=where))
    batch = tiny_batch(name)
    with torch.no_grad():
        assert gap(routed(model, batch), rows_of(model, batch)) < 1e-5
    with active(model, "b"):
        (answer(model, batch) ** 2).mean().backward()
    pieces = [p for key, p in model.named_parameters() if ".grafts.b." in key]
    assert len(pieces) == 2
    assert all(piece.grad is not None and piece.grad.abs().sum() > 0 for piece in pieces)


def test_a_deep_vision_prompt_is_the_published_one():
    """[CLS, prompt_i, patches] into layer i, the prompt's own outputs thrown away."""
    model = grafted("vit", deep)
    pixels = tiny_batch("vit")["pixel_values"]
    base = model.vit
    pieces = [p for key, p in model.named_parameters() if ".grafts.a." in key]
    with torch.no_grad():
        with active(model):
            hidden = base.embeddings(pixels)
            cls, patches = hidden[:, :1], hidden[:, 1:]
            for layer, piece in zip(base.layers, pieces, strict=True):
                out = layer(torch.cat([cls, piece.expand(3, -1, -1), patches], 1))
                out = out[0] if isinstance(out, tuple) else out
                cls, patches = out[:, :1], out[:, 6:]
            by_hand = base.layernorm(torch.cat([cls, patches], 1))
        with active(model, "a"):
            assert gap(base(pixel_values=pixels).last_hidden_state, by_hand) < 2e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_deep_prompts_generate_from_a_cache(name):
    model = grafted(name, deep, factor=2.0)
    ids, mask = tokens(length=9)
    with torch.no_grad(), route(model, ["a", "b"], torch.tensor([0, 1, -1])):
        assert gap(stepwise(model, ids, mask, 6, 1), whole(model, ids, mask), mask) < 5e-5


def test_a_deep_prompt_that_begins_late_is_refused():
    model = tiny("vit")
    attach(model, DeepPrompt(length=3, workspaces=("layer",), layers="last 1"), head=False)
    with pytest.raises(StateError, match="begins behind the first layer"):
        model(**tiny_batch("vit"))


# ---- training, compiling, copying, leaving


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "llama:deep", "vit:deep"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_route_left_before_backward_gives_the_same_gradients_under_checkpointing(name, reentrant):
    kept, calls = _gradients(name, None)
    recomputed, again = _gradients(name, {"use_reentrant": reentrant})
    assert again == 2 * calls
    for key, value in kept.items():
        assert gap(value, recomputed[key]) < 1e-5 * max(1.0, value.abs().max().item())


def _gradients(name: str, checkpointing) -> tuple[dict[str, Tensor], int]:
    family, _, kind = name.partition(":")
    model, batch = grafted(family, deep if kind else prompt), tiny_batch(family)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for option in ("attention_dropout", "dropout", "dropout_prob"):
            if isinstance(getattr(module, option, None), float):
                setattr(module, option, 0.0)
    if checkpointing is not None:
        model.activation_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    calls: list[int] = []
    for module in model.modules():
        if type(module).__name__ in (
            "LlamaAttention",
            "BertSelfAttention",
            "T5LayerSelfAttention",
            "ViTAttention",
        ):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(".grafts." in key)
    with route(model, ["a", "b"], torch.tensor([0, 1, -1])):
        loss = (answer(model, batch) ** 2).mean()
    loss.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}, len(calls)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_it_compiles_without_a_break(name):
    model, batch = grafted(name, prompt), tiny_batch(name)
    plain = {key: value for key, value in batch.items() if key != "attention_mask"}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for inputs in (batch, plain):
            with active(model, "a"):
                assert gap(answer(compiled, inputs), answer(model, inputs)) < 1e-6
            with route(model, ["a", "b"], torch.tensor([0, 1, -1])):
                assert gap(answer(compiled, inputs), answer(model, inputs)) < 1e-6


@pytest.mark.slow
def test_a_new_index_needs_no_new_graph():
    model, batch = grafted("llama", prompt), tiny_batch("llama")
    graphs: list[int] = []

    def count(graph, _):
        graphs.append(1)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad():
        routed(model, batch)  # the first forward is checked
        for index in ([0, 1, -1], [1, 0, 0], [-1, -1, 1]):
            with route(model, ["a", "b"], torch.tensor(index)):
                assert gap(answer(compiled, batch), answer(model, batch)) < 1e-6
    assert len(graphs) == 1


def test_a_copy_and_a_saved_model_have_their_own_adapters():
    batch, model = tiny_batch("llama"), grafted("llama", prompt)
    with torch.no_grad():
        before = answer(model, batch)
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        with active(model):
            assert gap(answer(twin, batch), before) == 0
            assert gap(answer(torch.load(file, weights_only=False), batch), before) == 0


@pytest.mark.parametrize("name", ["llama", "t5", "bart", "vit", "vit:deep"])
def test_detach_leaves_nothing(name):
    family, _, kind = name.partition(":")
    model, batch = tiny(family), tiny_batch(family)
    classes = {path: type(module) for path, module in model.named_modules()}
    members = {path: set(module.__dict__) for path, module in model.named_modules()}
    keys, before = list(model.state_dict()), answer(model, batch)
    for adapter in ("a", "b"):
        attach(model, (deep if kind else prompt)(4), name=adapter, head=False)
    answer(model, batch)
    detach(model, "b")
    with active(model, "a"):
        assert gap(answer(model, batch), before) > 0.01
    detach(model)
    assert list(model.state_dict()) == keys
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == members
    assert torch.equal(answer(model, batch), before)


@pytest.mark.parametrize("name", ["llama", "bert", "mamba"])
def test_half_precision_and_autocast(name):
    model, batch = grafted(name, prompt), tiny_batch(name)
    with torch.no_grad():
        exact = routed(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            assert gap(routed(model, batch).float(), exact) < 0.3
        low = routed(model.to(torch.bfloat16), batch)
    assert gap(low.float(), exact) < 0.3


# ---- masks made by the caller, windows, refusals


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_finished_mask_is_widened(name):
    model = grafted(name, prompt)
    ids, mask = tokens(left=(0, 0, 0))
    mask[1, 5:] = 0
    square = torch.ones(7, 7, dtype=torch.bool)
    square = square.tril() if name == "llama" else square
    seen = square[None, None] & mask[:, None, None].bool()
    places = torch.arange(7).expand(3, -1)
    with torch.no_grad():
        plain = routed(model, {"input_ids": ids, "attention_mask": mask})
        for given in (seen, torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)):
            with route(model, ["a", "b"], torch.tensor([0, 1, -1])):
                out = model(input_ids=ids, attention_mask=given, position_ids=places).logits
            assert gap(real(out, {"attention_mask": mask}), plain) < 2e-6


def test_a_prompt_leaves_a_sliding_window():
    """Positions are known by memory, so a window of 4 in two layers never reaches back to the prompt."""
    model = grafted("mistral", prompt)
    ids, _ = tokens(length=30, left=(0, 0, 0))
    with active(model, "b"), pytest.warns(UserWarning, match="8 positions together"):
        model(input_ids=ids).logits[:, -1].sum().backward()
    piece = next(p for key, p in model.named_parameters() if ".grafts.b." in key)
    assert piece.grad.abs().max() == 0


def test_packed_sequences_are_refused():
    model = grafted("llama", prompt)
    ids, _ = tokens(batch=1)
    with active(model, "a"), pytest.raises(StateError, match="position_ids restart"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]]))


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "roberta"])
def test_a_row_that_outgrows_the_position_table_is_refused_and_one_that_fits_is_not(name):
    offset = 2 if name == "roberta" else 0  # its padding id, and one: the table's first rows are never used
    options = {"n_positions": 14} if name == "gpt2" else {"max_position_embeddings": 14 + offset}
    if name == "roberta":
        options["pad_token_id"] = 1
    model = grafted(name, prompt, options, lengths={"a": 5})
    model(input_ids=torch.full((1, 9), 7))
    with pytest.raises(StateError, match=r"prompt 5 \+ sequence 12 exceeds the 14 learned positions"):
        model(input_ids=torch.full((1, 12), 7))


def test_tokens_cannot_be_routed_to_prompts():
    model = grafted("llama", prompt)
    ids, _ = tokens()
    with (
        route(model, ["a"], torch.zeros(3, 7, dtype=torch.long)),
        pytest.raises(RouteError, match="whole rows"),
    ):
        model(input_ids=ids)
    with route(model, ["a"], torch.zeros(2, dtype=torch.long)), pytest.raises(RouteError, match=r"2 rows.*3"):
        model(input_ids=ids)


def test_windowed_vision_is_refused_with_the_way_out():
    with pytest.raises(PortUnavailable, match="prefix tuning"):
        attach(tiny("swin"), prompt(4), head=False)


def test_rows_of_different_lengths_cannot_share_an_encoder_output_without_a_mask():
    _, model = prompted("whisper:encoder")
    batch = tiny_batch("whisper")
    with route(model, ["a", "b"], torch.tensor([0, 1, 0])), pytest.raises(GraftworkError, match="one length"):
        model(**batch)


def test_a_prompt_of_another_width_is_refused():
    model = tiny("llama")
    adapter = attach(model, prompt(3), head=False)
    adapter.placed[0].graft.module.prompt.data = torch.zeros(3, 10)
    with pytest.raises(StateError, match="10 wide, the stack reads 32"):
        model(**tiny_batch("llama"))
