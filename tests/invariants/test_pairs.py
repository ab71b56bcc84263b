"""Any two techniques serve rows of one batch: routed equals one by one, on an encoder, a decoder that generates, and
a vision model."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftwork as gw
from cases import cases, first_cases
from graftwork.errors import NothingMatches, PortUnavailable
from graftwork.laws import answer, close, real, stir, told
from graftwork.reference.catalogue import techniques
from graftwork.testing import grafted, tiny, tiny_batch

pytestmark = pytest.mark.slow
HOSTS = ("bert", "llama", "vit")
PARTS, GENERATED, ROWS = 4, 2, torch.tensor([0, -1, 1])
UNCACHED = "tiny_attention_adapter"  # looks at earlier positions, so that it refuses a filled cache


@cache
def crowded(host: str) -> tuple[nn.Module, tuple[str, ...]]:
    """A model with one adapter of each technique that it can take, off their starting values."""
    model = tiny(host)
    for number, (name, technique) in enumerate(first_cases().items()):
        try:
            adapter = grafted(model, host, technique, name=name.replace("-", "_"), head=False)
        except (PortUnavailable, NothingMatches):
            continue
        stir(adapter, seed=number)
    fused = cases()["adapter-fusion"].others()
    return model, tuple(name for name in gw.adapters(model) if name not in fused)


@torch.no_grad()
def outputs(model: Any, host: str, cached: bool) -> Tensor:
    """Logits (B, ...) of a batch; of a decoder those of each generated token, (B, GENERATED, vocabulary)."""
    batch = tiny_batch(host)
    if host != "llama":
        return real(answer(model, batch), batch)
    options = {
        "max_new_tokens": GENERATED,
        "min_new_tokens": GENERATED,
        "do_sample": False,
        "use_cache": cached,
    }
    with told(model, batch):
        made = model.generate(**batch, **options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(made.logits, dim=1)


@cache
def alone(host: str, name: str, cached: bool) -> Tensor:
    """What an adapter answers by itself, or the bare base for no name."""
    model, _ = crowded(host)
    with gw.active(model, *filter(None, [name])):
        return outputs(model, host, cached)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("host", HOSTS)
def test_every_pair_of_techniques_in_one_batch(host: str, part: int) -> None:
    model, names = crowded(host)
    for pair in list(combinations(names, 2))[part::PARTS]:
        cached = UNCACHED not in pair
        with gw.route(model, list(pair), ROWS):
            found = outputs(model, host, cached)
        own = [alone(host, name, cached)[row] for row, name in enumerate((pair[0], "", pair[1]))]
        close(found, torch.stack(own), 5e-6, f"rows of {pair[0]}, the bare base and {pair[1]}")


@pytest.mark.parametrize(
    ("host", "lacks"), [("bert", set()), ("llama", {"bitfit"}), ("vit", {"query-prompt"})]
)
def test_the_pairs_are_of_all_techniques(host: str, lacks: set[str]) -> None:
    model, names = crowded(host)
    taken = {technique.name for name in names for technique in gw.adapters(model)[name].techniques}
    assert set(techniques()) - taken == lacks
