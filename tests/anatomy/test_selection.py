"""Workspace names, patterns, presets and layer ranges."""

import copy
import re

import pytest
from hosts import ALL, host
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graftwork.anatomy.layers import chosen_layers
from graftwork.anatomy.patterns import parse
from graftwork.anatomy.resolve import all_sites, select_sites
from graftwork.errors import BadOption, NothingMatches, PortUnavailable
from graftwork.reference.properties import Port
from graftwork.reference.site import Kind, Side
from graftwork.reference.workspaces import PRESETS


def keys(model, *workspaces, layers="all", port=Port.WEIGHT):
    return [site.key for site in select_sites(model, workspaces, layers, port)]


def modules(model, *workspaces, layers="all", port=Port.WEIGHT):
    return [site.module for site in select_sites(model, workspaces, layers, port)]


def test_exact_names():
    assert keys(host("llama"), "attention.query") == ["0/attention.query", "1/attention.query"]
    assert keys(host("bert"), "embedding") == ["embedding"]
    assert keys(host("bert"), "norm") == ["0/norm", "0/norm#1", "1/norm", "1/norm#1"]


def test_stack_in_front():
    model = host("t5")
    assert keys(model, "decoder.cross_attention.key") == [
        "decoder.0/cross_attention.key",
        "decoder.1/cross_attention.key",
    ]
    assert len(keys(model, "attention.key")) == 4
    assert keys(host("clip"), "text.embedding") == ["text.embedding"]
    assert keys(model, "encoder.attention.*", layers=(0,)) == [
        f"encoder.0/attention.{part}" for part in ("query", "key", "value", "output")
    ]


def test_order_is_the_models_and_nothing_comes_twice():
    model = host("llama")
    both = keys(model, "attention.value", "attention.query", "attention.*", "all-linear")
    assert len(set(both)) == len(both)
    assert both == [key for key in keys(model, "*") if key in set(both)]


def test_alternatives_take_the_first_that_the_model_has():
    assert modules(host("llama"), "attention.qkv|attention.query", layers=(0,)) == [
        "model.layers.0.self_attn.q_proj"
    ]
    assert modules(host("gpt2"), "attention.qkv|attention.query", layers=(0,)) == [
        "transformer.h.0.attn.c_attn"
    ]
    assert [s.workspace for s in select_sites(host("gpt2"), ("attention.query|attention.qkv",), (0,))] == [
        "attention.query"
    ]


def test_optional_entries_may_miss():
    assert keys(host("resnet"), "attention.query?", "head") == ["head"]
    assert keys(host("mamba"), "attention.value?|ssm.out?", layers=(1,)) == ["1/ssm.out"]
    with pytest.raises(NothingMatches):
        keys(host("resnet"), "attention.query", "head")


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "phi3", "modernbert", "bloom"])
@pytest.mark.parametrize("pattern", ["attention.*", "*", "all-linear", "attention-only"])
def test_patterns_take_a_fused_projection_whole(name, pattern):
    sites = select_sites(host(name), (pattern,))
    assert all(site.channels is None for site in sites)
    assert "attention.qkv" in {site.workspace for site in sites}


@pytest.mark.parametrize("name", ["phi3", "modernbert"])
def test_the_feedforward_preset_takes_a_fused_gate_whole(name):
    found = {site.workspace for site in select_sites(host(name), ("feedforward-only",))}
    assert found == {"feedforward.gate_up", "feedforward.down"}


@pytest.mark.parametrize("name", [name for name in ALL if name != "resnet"])
def test_all_linear_takes_every_linear_layer_inside_layers(name):
    model = host(name)
    linear = {
        path for path, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    }
    inside = {path for path in linear if re.search(r"\.\d+\.", path)}
    apart = {path for path in inside if re.search("dt_proj|downsample", path)}
    joint = {"visual_projection", "text_projection"} if name == "clip" else set()
    assert set(modules(model, "all-linear")) == (inside - apart) | joint


def test_regular_expressions_match_whole_module_names():
    model = host("llama")
    sites = select_sites(model, (r"re:model\.layers\.\d+\.mlp\.(up|down)_proj",), (1,))
    assert [site.key for site in sites] == [
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert [site.workspace for site in sites] == ["feedforward.up", "feedforward.down"]
    with pytest.raises(NothingMatches, match=r"no module name matches 're:mlp'.*model\.embed_tokens"):
        keys(model, "re:mlp")
    with pytest.raises(BadOption, match="regular expression"):
        keys(model, "re:(")


def test_expressions_give_experts_keys_of_their_own():
    found = keys(host("mixtral"), r"re:model\.layers\.0\.mlp\.experts")
    assert found == ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]


def test_places_outside_layers_go_with_all_or_by_their_own_name():
    model = host("bert-base")
    assert "embedding" in keys(model, "*")
    assert {key[0] for key in keys(model, "*", layers="last 1")} == {"1"}
    assert keys(model, "norm.final", "attention.query", layers=(-1,)) == ["norm.final", "1/attention.query"]
    assert keys(host("bert"), "lm_head", layers="first 1") == ["lm_head"]


def test_each_stack_counts_its_own_layers():
    assert keys(host("t5"), "attention.query", layers="last 1") == [
        "encoder.1/attention.query",
        "decoder.1/attention.query",
    ]


def test_a_place_missing_in_the_chosen_layers():
    with pytest.raises(NothingMatches, match=r"exists in layers \[0\] only"):
        keys(host("t5"), "encoder.embedding.position", layers=(1,))


def test_errors_name_what_was_sought_what_exists_and_the_nearest():
    with pytest.raises(NothingMatches) as caught:
        keys(host("llama"), "atention.query")
    text = str(caught.value)
    assert "LlamaForCausalLM" in text
    assert "'atention.query'" in text
    assert "Did you mean attention.query" in text
    assert "feedforward.down" in text
    with pytest.raises(NothingMatches, match=r"no workspace 'attention' at this port.*name its projections"):
        keys(host("llama"), "attention")
    with pytest.raises(NothingMatches, match=r"may stand decoder\. or encoder\."):
        keys(host("t5"), "encodr.norm")


def test_a_lone_text_is_not_a_list():
    with pytest.raises(BadOption, match=r"\['attention.query'\]"):
        select_sites(host("bert"), "attention.query")


def test_modules_are_found_once_even_under_two_names():
    model = nn.Sequential(nn.Linear(3, 3))
    model.add_module("again", model[0])
    assert len(all_sites(model)) == 1


def test_selecting_changes_nothing():
    model = copy.deepcopy(host("bert"))
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    first = select_sites(model, ("*",))
    assert select_sites(model, ("*",)) == first
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


class TestHiddenPort:
    def test_blocks_span_from_first_to_last_projection(self):
        (site,) = select_sites(host("llama"), ("feedforward",), (0,), Port.HIDDEN)
        assert (site.entry, site.module) == (
            "model.layers.0.mlp.gate_proj",
            "model.layers.0.mlp.down_proj",
        )
        assert (site.channels_in, site.channels_out, site.weighted) == (32, 32, False)
        (site,) = select_sites(host("gpt2"), ("attention",), (1,), Port.HIDDEN)
        assert (site.entry, site.module) == ("transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj")

    def test_the_inner_activation_is_what_the_last_projection_reads(self):
        (site,) = select_sites(host("bert"), ("feedforward.activation",), (0,), Port.HIDDEN)
        assert (site.side, site.width, site.module) == (Side.INPUT, 64, "bert.encoder.layer.0.output.dense")

    def test_layers(self):
        (site,) = select_sites(host("t5"), ("decoder.layer",), (1,), Port.HIDDEN)
        assert (site.module, site.kind, site.width) == ("decoder.block.1", Kind.BLOCK, 32)
        (site,) = select_sites(host("resnet"), ("layer",), (2,), Port.HIDDEN)
        assert (site.channels_in, site.channels_out, site.channel_axis) == (16, 32, 1)

    def test_bare_parameters_have_no_activations(self):
        assert not [
            s for s in select_sites(host("mixtral"), ("*",), port=Port.HIDDEN) if s.kind is Kind.PARAMETER
        ]
        with pytest.raises(NothingMatches):
            keys(host("mixtral"), "experts.down", port=Port.HIDDEN)


class TestOtherPorts:
    def test_refusals_give_the_reason_and_the_places_there_are(self):
        with pytest.raises(PortUnavailable, match=r"Mamba has no attention.*ssm\.in"):
            keys(host("mamba"), "attention", port=Port.ATTENTION)
        with pytest.raises(PortUnavailable, match="disentangled"):
            keys(host("deberta-v2"), "attention", port=Port.ATTENTION)
        with pytest.raises(PortUnavailable, match="windows"):
            keys(host("swin"), "embedding", port=Port.SEQUENCE)

    def test_attention(self):
        assert keys(host("t5"), "attention", "cross_attention", layers=(0,), port=Port.ATTENTION) == [
            "encoder.0/attention",
            "decoder.0/attention",
            "decoder.0/cross_attention",
        ]

    def test_prompts_enter_where_the_stack_really_runs(self):
        assert modules(host("opt"), "embedding", port=Port.SEQUENCE) == ["model.decoder"]
        assert modules(host("bert-base"), "embedding", port=Port.SEQUENCE) == [""]
        (site,) = select_sites(host("electra"), ("embedding",), port=Port.SEQUENCE)
        assert site.width == 16
        (site,) = select_sites(host("opt-projected"), ("embedding",), port=Port.SEQUENCE)
        assert site.width == 16

    def test_deep_prompts_have_a_site_for_every_layer(self):
        sites = select_sites(host("vit"), ("layer",), port=Port.SEQUENCE)
        assert [(s.key, s.module, s.width) for s in sites] == [
            ("0/layer", "vit.layers.0", 32),
            ("1/layer", "vit.layers.1", 32),
        ]


COUNTS = st.integers(1, 40)


@given(COUNTS, st.data())
def test_layer_ranges_are_slices(count, data):
    number = data.draw(st.integers(1, count))
    low = data.draw(st.integers(0, count - 1))
    high = data.draw(st.integers(low, count - 1))
    every = list(range(count))
    assert chosen_layers("all", count) == set(every)
    assert chosen_layers(f"first {number}", count) == set(every[:number])
    assert chosen_layers(f"last {number}", count) == set(every[-number:])
    assert chosen_layers(f"every {number}", count) == set(every[::number])
    assert chosen_layers(f"{low}-{high}", count) == set(every[low : high + 1])


@given(COUNTS, st.lists(st.integers(-60, 60), max_size=5))
def test_layer_numbers_are_indices(count, numbers):
    every = range(count)
    try:
        expected = {every[number] for number in numbers}
    except IndexError:
        with pytest.raises(BadOption, match=f"0 to {count - 1}"):
            chosen_layers(tuple(numbers), count)
    else:
        assert chosen_layers(tuple(numbers), count) == expected


@given(COUNTS, st.text(max_size=12))
def test_any_other_text_is_refused_or_means_layers_that_exist(count, text):
    try:
        found = chosen_layers(text, count)
    except BadOption:
        return
    assert found <= set(range(count))


@pytest.mark.parametrize(
    "layers", ["last 3", "first 0", "every 0", "1-2", "1-0", "some", (2,), (-3,), "2", ""]
)
def test_layers_out_of_range(layers):
    with pytest.raises(BadOption):
        chosen_layers(layers, 2)


NAMES = st.from_regex(r"[a-z_]{1,8}(\.[a-z_]{1,8}){0,2}(\.\*)?", fullmatch=True)


@given(st.lists(st.tuples(NAMES, st.booleans()), min_size=1, max_size=4))
def test_entries_are_read_back(parts):
    entry = parse("|".join(f"{name}{'?' if mark else ''}" for name, mark in parts))
    assert entry.alternatives == tuple(name for name, _ in parts)
    assert entry.optional == any(mark for _, mark in parts)


@settings(max_examples=30, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=3), st.sampled_from(["gpt2", "t5", "mixtral"]))
def test_optional_entries_never_raise_and_never_invent(names, model):
    entry = "|".join(names) + "?"
    sites = select_sites(host(model), (entry,))
    assert set(sites) <= set(select_sites(host(model), ("*",)))


@pytest.mark.parametrize("text", ["", "|", "a|", "?", "a||b"])
def test_empty_names_are_refused(text):
    with pytest.raises(BadOption):
        parse(text)


def test_presets_hit_something_in_every_transformer():
    for name in ALL:
        workspaces = {site.workspace for site in select_sites(host(name), ("*",))}
        for preset in PRESETS:
            if any(w.startswith("attention.") for w in workspaces):
                if preset == "feedforward-only" and name == "mixtral":
                    continue
                assert keys(host(name), preset)
