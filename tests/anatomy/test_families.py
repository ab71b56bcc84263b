"""Every table against the model it describes: what its modules do in a forward pass."""

import dataclasses
import functools
import inspect
import re
from collections import defaultdict

import pytest
import torch
from hosts import ALL, VARIANTS, host

from graftwork.anatomy.anatomy import places_of
from graftwork.anatomy.families import families
from graftwork.anatomy.owners import owners
from graftwork.anatomy.resolve import all_sites, anatomy_of, layer_modules, select_sites, stack_of
from graftwork.anatomy.walk import expand
from graftwork.reference.properties import Port
from graftwork.reference.site import Access, Kind, Side
from graftwork.reference.workspaces import WORKSPACES
from graftwork.testing import tiny, tiny_batch

# Bare parameters: each is a workspace of its own.
LOOSE = {
    "vit": {"cls_token", "position_embeddings"},
    "dinov2": {"cls_token", "position_embeddings", "lambda1"},
    "swin": {"relative_position_bias_table"},
    "clip": {"logit_scale", "class_embedding"},
    "mamba": {"A_log", "D"},
    "mamba2": {"A_log", "D", "dt_bias"},
    "convnext": {"layer_scale_parameter"},
}
UNUSED = {"dinov2": {"mask_token"}}


@pytest.fixture(scope="module")
def traces():
    """Model -> module path -> (shapes it read, shapes it answered) in one forward pass."""
    return {}


def trace(model, inputs):
    seen = defaultdict(lambda: ([], []))
    hooks = [
        module.register_forward_hook(functools.partial(record, seen[path]), with_kwargs=True)
        for path, module in model.named_modules()
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return {path: entry for path, entry in seen.items() if entry[1]}


def record(entry, _, args, kwargs, out):
    signal = args[0] if args else next((kwargs[k] for k in ("hidden_states", "input") if k in kwargs), None)
    answer = out[0] if isinstance(out, tuple) else out
    entry[0].append(tuple(getattr(signal, "shape", ())))
    entry[1].append(tuple(getattr(answer, "shape", ())))


def traced(traces, name):
    if name not in traces:
        traces[name] = trace(host(name), tiny_batch(name))
    return traces[name]


@pytest.mark.parametrize("name", [*ALL, *VARIANTS])
def test_keys_are_unique_and_workspaces_are_words_of_the_vocabulary(name):
    sites = all_sites(host(name))
    keys = [site.key for site in sites]
    assert len(set(keys)) == len(keys)
    known = {re.sub(r"^parameter\..*", "parameter.NAME", site.workspace) for site in sites}
    assert known <= set(WORKSPACES)


def test_every_path_of_every_table_exists_somewhere():
    """A misspelt path would be skipped without a word, so each must hit a module of some variant."""
    missing = {(id(a), path) for a in families().values() for path in _paths(a)}
    for name in [*ALL, *VARIANTS]:
        for owner in owners(host(name)):
            hit = {path for path in _paths(owner.anatomy) if _hits(owner, path)}
            missing -= {(id(owner.anatomy), path) for path in hit}
    assert not sorted(path for _, path in missing)


def _paths(anatomy):
    for stack in anatomy.stacks:
        yield from (("", p, stack.layers) for p in stack.layers)
        yield from (("", place.path, ()) for _, place in places_of(stack.around))
        yield from (("layer", place.path, stack.layers) for _, place in places_of(stack.places))
    yield from (("", path, ()) for path in anatomy.unused)


def _hits(owner, entry):
    where, path, layers = entry
    if not where:
        return bool(expand(owner.base, path)) or path in dict(owner.base.named_parameters())
    return any(expand(layer, path) for pattern in layers for _, layer in expand(owner.base, pattern))


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_is_at_a_site(name):
    model = host(name)
    stored = {id(p): n for n, p in model.named_parameters()}
    for site in select_sites(model, ("*",)):
        module = model.get_submodule(site.module)
        for parameter in (site.parameter, "bias"):
            stored.pop(id(getattr(module, parameter, None)), None)
    left = {name.rpartition(".")[2] for name in stored.values()}
    assert left == UNUSED.get(name, set())


@pytest.mark.parametrize("name", ALL)
def test_bare_parameters_are_workspaces_in_their_layer(name):
    model = host(name)
    found = [site for site in all_sites(model) if site.kind is Kind.TENSOR]
    assert {site.workspace for site in found} == {f"parameter.{loose}" for loose in LOOSE.get(name, ())}
    for site in found:
        stored = getattr(model.get_submodule(site.module), site.parameter)
        assert site.shape == stored.shape
        inside = ".layers." in site.module or ".layer." in site.module
        assert (site.layer is not None) is inside


@pytest.mark.parametrize("name", ALL)
def test_no_parameter_is_at_two_sites_of_a_pattern(name):
    model = host(name)
    seen = [(site.module, site.parameter) for site in select_sites(model, ("*",))]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("name", ALL)
def test_widths_are_those_of_the_activations(name, traces):
    model, seen = host(name), traced(traces, name)
    for site in all_sites(model):
        if site.kind in (Kind.PARAMETER, Kind.TENSOR) or site.module not in seen:
            continue
        for read, answer in zip(*seen[site.module], strict=True):
            total = site.fused_width or site.channels_out
            entered = seen[site.entry][0][0] if site.entry else read
            if site.side is Side.INPUT:
                assert read[site.channel_axis] == site.width, site.key
            else:
                assert answer[site.channel_axis] == total, site.key
            if site.kind is not Kind.EMBEDDING and entered:
                assert entered[site.channel_axis] == site.channels_in, site.key


@pytest.mark.parametrize("name", ALL)
def test_matrices_have_the_shape_of_the_weight(name):
    model = host(name)
    for site in select_sites(model, ("*",)):
        weight = getattr(model.get_submodule(site.module), site.parameter)
        expected = weight.shape
        if site.kind is Kind.EMBEDDING or type(model.get_submodule(site.module)).__name__ == "Conv1D":
            expected = weight.T.shape
        if site.kind is Kind.CONVOLUTION:
            expected = weight.flatten(1).shape
            assert site.kernel == weight.shape[2:]
        assert site.shape == tuple(expected), site.key
        assert site.has_bias == (getattr(model.get_submodule(site.module), "bias", None) is not None), (
            site.key
        )
        assert (site.dtype, site.device) == (weight.dtype, weight.device)


@pytest.mark.parametrize("name", ALL)
def test_access_is_how_the_host_uses_the_module(name, traces):
    seen = traced(traces, name)
    for site in select_sites(host(name), ("*",)):
        if site.kind not in (Kind.PARAMETER, Kind.TENSOR):
            assert (site.module in seen) == (site.access is not Access.READ), site.key


def zeroed(model, site, value=0.0):
    """Change the rows that a part owns: to zeros, or to themselves times `value`."""
    module = model.get_submodule(site.module)
    transposed = type(module).__name__ == "Conv1D"
    for parameter in (module.weight, module.bias):
        if parameter is None:
            continue
        rows = parameter.data.T if transposed and parameter.dim() == 2 else parameter.data
        index = torch.arange(rows.shape[0])
        if len(site.channels) == 2:
            mine = index[site.channels[0] : site.channels[1]]
        else:
            heads, parts, part, width = site.channels
            mine = index.view(heads, parts, width)[:, part].flatten()
        rows[mine] *= value


def reads(model, inputs, path):
    """What a module reads in one forward pass."""
    kept = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return kept[-1]


FUSED = ("modernbert", "gpt2", "gpt-neox", "bloom", "phi3")


@pytest.mark.parametrize("name", FUSED)
def test_the_value_part_is_what_the_output_projection_reads(name):
    model, inputs = tiny(name), tiny_batch(name)
    (output,) = select_sites(model, ("attention.output",), (0,))
    before = reads(model, inputs, output.module)
    zeroed(model, select_sites(model, ("attention.value",), (0,))[0], -1.0)
    torch.testing.assert_close(reads(model, inputs, output.module), -before)


@pytest.mark.parametrize("name", FUSED)
def test_without_the_query_part_the_key_part_does_not_matter(name):
    model, inputs = tiny(name), tiny_batch(name)
    output = select_sites(model, ("attention.output",), (0,))[0].module
    plain = reads(model, inputs, output)
    zeroed(model, select_sites(model, ("attention.query",), (0,))[0])
    uniform = reads(model, inputs, output)
    zeroed(model, select_sites(model, ("attention.key",), (0,))[0], 7.0)
    torch.testing.assert_close(reads(model, inputs, output), uniform)
    assert not torch.allclose(plain, uniform)


@pytest.mark.parametrize("name", ["modernbert", "phi3"])
def test_the_up_part_is_linear_and_the_gate_part_is_not(name):
    model, inputs = tiny(name), tiny_batch(name)
    down = select_sites(model, ("feedforward.down",), (0,))[0].module
    before = reads(model, inputs, down)
    zeroed(model, select_sites(model, ("feedforward.up",), (0,))[0], -1.0)
    torch.testing.assert_close(reads(model, inputs, down), -before)
    zeroed(model, select_sites(model, ("feedforward.gate",), (0,))[0], -1.0)
    assert not torch.allclose(reads(model, inputs, down).abs(), before.abs())


def test_cross_attention_parts_of_gpt2():
    sites = select_sites(host("gpt2-cross"), ("cross_attention.key", "cross_attention.value"), (0,))
    assert [site.channels for site in sites] == [(0, 32), (32, 64)]


CLOSED = ("deberta-v2", "bloom", "falcon", "mamba", "mamba2", "resnet", "convnext")


@pytest.fixture
def probe(monkeypatch):
    """An attention implementation that notes the shapes of keys and values, (batch, heads, tokens, width)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = {}

    def watch(module, query, key, value, *args, **kwargs):
        seen[id(module)] = (key.shape, value.shape)
        kwargs.pop("softcap", None)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "probe", watch)
    return seen


@pytest.mark.parametrize("name", [name for name in ALL if name not in CLOSED])
def test_attention_sites_say_heads_and_widths_of_keys_and_values(name, probe):
    model = tiny(name)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation_internal = "probe"
    with torch.no_grad():
        model(**tiny_batch(name, padding=False))
    workspaces = ("attention", "cross_attention?")
    sites = select_sites(model, workspaces, port=Port.ATTENTION)
    assert len(sites) == len(probe)
    for site in sites:
        key, value = probe[id(model.get_submodule(site.module))]
        assert (site.heads, site.key_width, site.value_width) == (
            key[1],
            key[1] * key[3],
            value[1] * value[3],
        )
        assert site.kind is Kind.ATTENTION


@pytest.mark.parametrize("name", ALL)
def test_attention_is_refused_exactly_where_it_does_not_go_through_the_interface(name):
    model = host(name)
    for stack in anatomy_of(model).stacks:
        if stack.attention is not None:
            hits = [
                m
                for p in stack.layers
                for _, layer in expand(model, p)
                for _, m in expand(layer, stack.attention)
            ]
            asked = {
                "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(m).forward).__code__.co_names for m in hits
            }
            assert asked == {not stack.attention_reason}


@pytest.mark.parametrize("name", ALL)
def test_sequence_sites_take_what_the_stack_takes(name, traces):
    model, seen = host(name), traced(traces, name)
    open_ = [stack for stack in anatomy_of(model).stacks if stack.sequence]
    sites = select_sites(model, ("embedding",), port=Port.SEQUENCE) if open_ else ()
    assert len(sites) == len(open_)
    for site in sites:
        assert site.kind is Kind.STACK
        assert site.module in seen, "the stack that a site names must really run"
        layers = layer_modules(model, site)
        assert all(path in seen for path in layers)
        if stack_of(model, site).sequence == "stack":
            table = model.get_submodule(site.module).get_input_embeddings()
            assert table.weight.shape[1] == site.width == site.width_out
            assert site.entry is None
        else:
            assert site.entry == layers[0]
            assert seen[layers[0]][0][0][-1] == site.width


@pytest.mark.parametrize("name", ALL)
def test_the_meta_device_gives_the_same_sites(name):
    with torch.device("meta"):
        hollow = tiny(name)
    here, there = all_sites(host(name)), all_sites(hollow)
    assert {site.device.type for site in there} == {"meta"}
    assert [dataclasses.replace(site, device=torch.device("cpu")) for site in there] == list(here)


def test_causal_stacks():
    def causal(name):
        return {stack.name: stack.causal for stack in anatomy_of(host(name)).stacks}

    assert causal("llama") == {"": True}
    assert causal("bert") == {"": False}
    assert causal("bert-cross") == {"": True}
    assert causal("t5") == causal("whisper") == {"encoder": False, "decoder": True}
    assert causal("clip") == {"text": True, "vision": False}
