"""Cards and options: valid, counted as the typology says, and surviving JSON."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import handmade as by_hand
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.errors import BadOption, CardConflict, UnknownName
from graftwork.reference import properties
from graftwork.reference.catalogue import make, techniques
from graftwork.reference.technique import Above, AtLeast, Between, Technique
from graftwork.techniques.bottleneck_adapter import BottleneckAdapter
from graftwork.techniques.compacter import Compacter
from graftwork.techniques.ia3 import IA3
from graftwork.techniques.lora import LoRA
from graftwork.techniques.prefix_tuning import PrefixTuning
from graftwork.techniques.prompt_tuning import PromptTuning
from graftwork.techniques.tiny_attention_adapter import TinyAttentionAdapter

OWN = {name: kind for name, kind in techniques().items() if kind.__module__.startswith("graftwork.")}
FIRST = {
    "lora", "bottleneck-adapter", "tiny-attention-adapter", "compacter", "ia3", "prompt-tuning", "p-tuning",
    "prefix-tuning", "bitfit", "norm-tuning", "ssf", "fine-tuning",
}  # fmt: skip
NINE = {
    "intra_connectivity": properties.IntraConnectivity,
    "inter_connectivity": properties.InterConnectivity,
    "adaptation": properties.Adaptation,
    "sharing": properties.Sharing,
    "input": properties.Input,
    "insertion": properties.Insertion,
    "insertions": properties.Insertions,
    "integration": properties.Integration,
}


def test_the_techniques_are_there() -> None:
    assert set(OWN) >= FIRST


@pytest.mark.parametrize("kind", OWN.values(), ids=OWN)
def test_card_has_nine_valid_properties(kind: type[Technique]) -> None:
    card = kind().card
    assert all(isinstance(getattr(card, name), values) for name, values in NINE.items())
    assert card.workspaces
    assert all(isinstance(workspace, str) for workspace in card.workspaces)
    assert card.port in properties.Port
    assert card.formula
    assert card.parameters
    assert "arXiv:" in card.citation


@pytest.mark.parametrize("kind", OWN.values(), ids=OWN)
def test_published_card_is_that_of_the_default_instance(kind: type[Technique]) -> None:
    assert dataclasses.replace(kind().card, scale=1.0) == dataclasses.replace(kind.published, scale=1.0)


@pytest.mark.parametrize("kind", OWN.values(), ids=OWN)
def test_one_short_file(kind: type[Technique]) -> None:
    lines = Path(inspect.getfile(kind)).read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 105


@pytest.mark.parametrize(
    ("technique", "sites", "expected"),
    [
        (PromptTuning(length=5), [by_hand.STACK], 80),
        (PrefixTuning(length=5, hidden=None), [by_hand.ATTENTION], 160),
        (LoRA(rank=4), [by_hand.QUERY, by_hand.VALUE], 256),
        (BottleneckAdapter(width=4, bias=False), [by_hand.ATTENTION_OUT, by_hand.FEEDFORWARD], 256),
        (BottleneckAdapter(width=4), [by_hand.ATTENTION_OUT, by_hand.FEEDFORWARD], 296),
        (TinyAttentionAdapter(width=4, heads=1), [by_hand.ATTENTION_OUT], 256),
        (Compacter(width=4, bias=False), [by_hand.ATTENTION_OUT, by_hand.FEEDFORWARD], 80 + 64),
        (IA3(), [by_hand.KEY, by_hand.VALUE, by_hand.INNER], 96),
    ],
    ids=lambda value: value.name if isinstance(value, Technique) else "",
)
def test_parameters_per_layer_are_those_of_the_typology(
    technique: Technique, sites: list, expected: int
) -> None:
    assert by_hand.count(by_hand.build(technique, sites)) == expected


def test_parameters_at_the_width_of_bert_base() -> None:
    wide = by_hand.linear("attention", 768, 768)
    assert by_hand.count([LoRA(rank=8).build(wide), LoRA(rank=8).build(wide)]) == 24576
    adapter = BottleneckAdapter(width=64, bias=False)
    assert by_hand.count([adapter.build(wide), adapter.build(wide)]) == 196608
    assert by_hand.count([TinyAttentionAdapter(width=1, heads=1).build(wide)]) == 3072
    compacter = Compacter(width=64, bias=False)
    assert by_hand.count(by_hand.build(compacter, [wide, wide])) == 3328 + 4**3


def test_prefix_parameters_while_its_mlp_is_trained() -> None:
    length, hidden, layers = 5, 8, 3
    modules = by_hand.build(PrefixTuning(length=length, hidden=hidden), [by_hand.ATTENTION] * layers)
    width = by_hand.WIDTH
    biases = hidden + layers * 2 * width
    assert by_hand.count(modules) == length * width + width * hidden + 2 * hidden * layers * width + biases


@pytest.mark.parametrize("kind", OWN.values(), ids=OWN)
def test_a_meta_model_is_counted_without_reading_a_weight(kind: type[Technique]) -> None:
    def unreadable() -> torch.Tensor:
        raise AssertionError("a weight was read")

    site = by_hand.HOMES[kind().card.port.value]
    site = dataclasses.replace(site, matrix=unreadable, bias=unreadable)
    technique = by_hand.smallest(kind)
    real = by_hand.build_one(technique)
    with torch.device("meta"):
        planned = by_hand.build_one(technique, site)
    assert all(tensor.is_meta for tensor in planned.parameters())
    assert [t.shape for t in planned.parameters()] == [t.shape for t in real.parameters()]


def test_variants_of_the_bottleneck_are_cards() -> None:
    houlsby, pfeiffer = BottleneckAdapter.houlsby().card, BottleneckAdapter.pfeiffer().card
    first = [entry.partition("|")[0].rstrip("?") for entry in houlsby.workspaces]
    assert first == ["attention", "feedforward"]
    assert not houlsby.identity_at_init
    assert pfeiffer == BottleneckAdapter.published
    he, chen = BottleneckAdapter.parallel(), BottleneckAdapter.adaptformer()
    for variant in (he, chen):
        assert (variant.card.insertion, variant.card.integration) == ("parallel", "scaled addition")
    assert (he.width, he.card.scale) == (512, 4.0)
    assert (chen.width, chen.card.scale) == (64, 0.1)


@pytest.mark.parametrize(
    ("name", "options", "names"),
    [
        ("lora", {"rank": 0}, "rank=0 must be at least 1"),
        ("lora", {"rank": 1.5}, "rank=1.5 is not a whole number"),
        ("lora", {"rank": True}, "is not a whole number"),
        ("lora", {"alpha": "16"}, "alpha='16' is not a finite number"),
        ("lora", {"alpha": float("nan")}, "is not a finite number"),
        ("lora", {"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        ("lora", {"stabilised": "yes"}, "is not a bool"),
        ("lora", {"layers": [0, "last"]}, "layers"),
        ("lora", {"insertion": "beside"}, "not one of sequential, parallel"),
        ("ia3", {"workspaces": [1]}, "is not a list of names"),
        ("bottleneck-adapter", {"nonlinearity": "swish"}, "is not one of 'relu', 'gelu', 'silu', 'tanh'"),
        ("bottleneck-adapter", {"width": 0}, "must be at least 1"),
        ("bottleneck-adapter", {"scale": 4.0}, "needs integration='scaled addition'"),
        ("compacter", {"order": 0}, "order=0 must be at least 1"),
        ("prompt-tuning", {"init": "words"}, "is not one of 'normal', 'vocabulary'"),
        ("p-tuning", {"encoder": "gru"}, "is not one of 'mlp', 'lstm'"),
        ("prefix-tuning", {"hidden": 0}, "hidden=0 must be at least 1"),
        ("fine-tuning", {"rate": 0.0}, "must be above 0"),
    ],
)
def test_bad_options_say_what_is_wrong(name: str, options: dict[str, Any], names: str) -> None:
    with pytest.raises(BadOption, match=names):
        make(name, options)


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="rank"):
        make("lora", {"ranks": 4})
    with pytest.raises(UnknownName, match="prefix-tuning"):
        make("prefix-tunning")


@pytest.mark.parametrize(
    "technique",
    [
        LoRA(insertion="sequential"),  # type: ignore[arg-type]
        IA3(insertion="parallel"),  # type: ignore[arg-type]
        IA3(integration="direct addition"),  # type: ignore[arg-type]
        PromptTuning(integration="gated addition"),  # type: ignore[arg-type]
        BottleneckAdapter(integration="concatenation"),  # type: ignore[arg-type]
        BottleneckAdapter(integration="rescaling"),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_impossible_overrides_are_refused(technique: Technique) -> None:
    with pytest.raises(CardConflict):
        _ = technique.card


def test_lists_and_single_names_are_taken_as_recipes_spell_them() -> None:
    assert LoRA(workspaces=["attention.query"], layers=[0, 1]) == LoRA(  # type: ignore[arg-type]
        workspaces=("attention.query",), layers=(0, 1)
    )
    assert LoRA(workspaces="all-linear").workspaces == ("all-linear",)  # type: ignore[arg-type]


def anything(hint: Any) -> st.SearchStrategy[Any]:
    """Valid values of an option, from its annotation."""
    inner = get_args(hint)
    if get_origin(hint) is Annotated and get_origin(inner[0]) is Literal:
        return anything(inner[0])
    if get_origin(hint) is Annotated:
        return st.one_of(*(limited(kind, inner[1:]) for kind in (get_args(inner[0]) or (inner[0],))))
    if get_origin(hint) is Literal:
        return st.sampled_from(inner)
    if get_origin(hint) is Mapping:
        return st.dictionaries(st.sampled_from(["0/attention.query", "head"]), anything(inner[1]))
    if hint is str:
        return st.text()
    if hint == tuple[str, ...]:
        return st.lists(st.text())
    if hint == tuple[int, ...]:
        return st.lists(st.integers(0, 99))
    if get_origin(hint) is UnionType:
        return st.none() | anything(inner[0])
    return st.booleans()


def limited(kind: type, checks: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    if kind is type(None):
        return st.none()
    low = {AtLeast: 0.0, Above: 1e-3, Between: 0.0}[type(checks[0])] + checks[0].low
    high = checks[0].high if isinstance(checks[0], Between) else low + 100
    if kind is int:
        return st.integers(int(low), int(high))
    return st.floats(low, high, exclude_max=True)


@pytest.mark.parametrize("kind", OWN.values(), ids=OWN)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_options_survive_json(kind: type[Technique], data: st.DataObject) -> None:
    hints = get_type_hints(kind, include_extras=True)
    common = {option.name for option in dataclasses.fields(Technique)}
    own = [option.name for option in dataclasses.fields(kind) if option.name not in common]
    options: dict[str, Any] = {name: data.draw(anything(hints[name]), label=name) for name in own}
    options["layers"] = data.draw(st.sampled_from(["all", "last 4", "2-5", [0, 3]]))
    options["workspaces"] = data.draw(st.sampled_from([None, ["attention.query"], ["re:.*out", "layer"]]))
    if options.get("scale", 1.0) != 1.0:
        options["integration"] = "scaled addition"
    technique = make(kind.name, options)
    plain = technique.options()
    assert all(type(value) in (bool, int, float, str, list, dict, type(None)) for value in plain.values())
    again = make(kind.name, json.loads(json.dumps(plain)))
    assert again == technique
    assert again.card == technique.card
    assert "workspaces" not in plain or options["workspaces"] is not None
