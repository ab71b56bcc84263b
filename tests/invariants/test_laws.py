"""Every law over every technique and the seven model families; what a host cannot take is pinned, with its reason."""

from __future__ import annotations

import pytest
import torch

from cases import cases, first_cases
from graftwork.errors import NothingMatches, PortUnavailable, RouteError
from graftwork.laws import LAWS
from graftwork.reference.catalogue import techniques
from graftwork.reference.technique import Technique
from graftwork.testing import grafted, tiny

EVERYDAY = "bert"
HOSTS = (EVERYDAY, "llama", "bert-classification", "gpt2", "t5", "vit", "mamba", "resnet")

# (technique, host) -> a word of the reason. Anything that starts or stops being refused must be looked at.
REFUSED: dict[tuple[str, str], str] = {
    ("bitfit", "llama"): "none of the",
    ("bitfit", "t5"): "none of the",
    ("mixture-of-lora", "resnet"): "has no workspace",
    ("mixture-of-lora, top two", "resnet"): "has no workspace",
    ("parallel-adapter", "resnet"): "stride",
    ("adalink-prompt", "resnet"): "none of the",
    ("p-tuning", "resnet"): "no sequence of positions",
    ("prompt-tuning", "resnet"): "no sequence of positions",
    ("prompt-pool", "resnet"): "no sequence of positions",
    **{
        (name, host): reason
        for name in ("query-prompt", "query-prompt-attention")
        for host, reason in (("resnet", "no sequence of positions"), ("vit", "no vocabulary"))
    },
    ("multitask-prompt-tuning", "resnet"): "no sequence of positions",
    ("loreft", "resnet"): "none of the",
    ("lora-gated", "resnet"): "stride",
    ("vpt", "resnet"): "no sequence of positions",
    ("vpt-deep", "resnet"): "no sequence of positions",
    **{
        (name, host): "no attention"
        for name in ("prefix-tuning", "prefix-tuning-mlp", "prefix-tuning-gated")
        for host in ("mamba", "resnet")
    },
}

# Techniques that attach and cannot be routed row by row at one site of a host.
UNROUTABLE = {
    ("fine-tuning", "t5"): "relative position bias is one table answer for all rows",
}


def refusal(technique: Technique, host: str) -> str | None:
    try:
        grafted(tiny(host), host, technique)
    except (PortUnavailable, NothingMatches) as reason:
        return str(reason)
    return None


def test_every_technique_has_a_case() -> None:
    assert {case.name for case in cases().values()} == set(techniques())


@pytest.mark.slow
def test_refusals_are_the_known_ones() -> None:
    found = {
        (name, host): reason
        for name, technique in cases().items()
        for host in HOSTS
        if (reason := refusal(technique, host)) is not None
    }
    assert sorted(found) == sorted(REFUSED)
    assert all(word in found[case] for case, word in REFUSED.items())


CASES = [
    pytest.param(name, host, marks=() if host == EVERYDAY and name in first else pytest.mark.slow)
    for first in (first_cases(),)
    for name in cases()
    for host in HOSTS
]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("name", "host"), CASES)
def test_law(name: str, host: str, law: str) -> None:
    torch.manual_seed(0)
    technique = cases()[name]
    try:
        LAWS[law](host, technique)
    except (PortUnavailable, NothingMatches):
        assert (name, host) in REFUSED
        pytest.skip(f"{REFUSED[name, host]} (pinned)")
    except RouteError:
        assert (name, host) in UNROUTABLE
        pytest.skip(f"{UNROUTABLE[name, host]} (pinned)")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in cases() if (name, "bert") not in REFUSED])
def test_every_tensor_is_made_where_the_host_is(name: str) -> None:
    model = tiny("bert").to("meta")
    grafted(model, "bert", cases()[name])
    elsewhere = {
        key for key, tensor in (*model.named_parameters(), *model.named_buffers()) if not tensor.is_meta
    }
    assert not elsewhere
