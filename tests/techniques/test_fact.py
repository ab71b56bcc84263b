"""FacT: one decomposed tensor for the updates of all matrices."""

from __future__ import annotations

from typing import Any

import handmade as by_hand
import pytest
import torch
from torch import Tensor

from graftwork.engine.attach import attach
from graftwork.errors import BadOption
from graftwork.reference.site import Site
from graftwork.techniques.fact import FacT
from graftwork.testing import tiny

WIDTH = 12
SITES = [
    by_hand.linear("attention.query", WIDTH, WIDTH),
    by_hand.linear("attention.key", 5, WIDTH),  # fewer heads than queries
    by_hand.linear("feedforward.up", 31, WIDTH),  # no multiple of the width
    by_hand.linear("feedforward.down", WIDTH, 31),
    by_hand.linear("linear", 31, 40),  # several tiles both ways
]
FORMS = ("tensor-train", "tucker")


def made(form: str, sites: list[Site] = SITES) -> list[Any]:
    technique = FacT(rank=3, alpha=0.5, decomposition=form)  # type: ignore[arg-type]
    modules = by_hand.build(technique, sites)
    return [by_hand.jittered(module, seed) for seed, module in enumerate(modules)]


def tile(module: Any, a: int, b: int) -> Tensor:
    """One d x d tile of the update, number by number from the paper's equations."""
    up, down, rank = module.shared["up"], module.shared["down"], 3
    if "core" in module.shared:
        mixture, core = module.mixture[a, b], module.shared["core"]
        inner = sum(mixture[k] * core[k] for k in range(rank))
    else:
        inner = module.core[a, b]
    terms = (inner[x, y] * torch.outer(up[:, x], down[y]) for x in range(rank) for y in range(rank))
    return 0.5 * sum(terms)  # type: ignore[return-value]


@pytest.mark.parametrize("number", range(len(SITES)), ids=[site.workspace for site in SITES])
@pytest.mark.parametrize("form", FORMS)
def test_the_update_is_made_of_tiles(form: str, number: int) -> None:
    site, module = SITES[number], made(form)[number]
    high, wide = -(-site.width_out // WIDTH), -(-site.width_in // WIDTH)
    rows = [torch.cat([tile(module, a, b) for b in range(wide)], dim=1) for a in range(high)]
    expected = torch.cat(rows)[: site.width_out, : site.width_in]
    torch.testing.assert_close(module.delta(), expected)
    down, up = module.factors()
    assert len(down) == up.shape[1] == 3 * min(high, wide)


@pytest.mark.parametrize(("form", "across"), [("tensor-train", 7), ("tucker", 3)])
def test_the_stack_of_all_updates_has_the_ranks_of_the_decomposition(form: str, across: int) -> None:
    squares = [by_hand.linear(f"attention.{n}", WIDTH, WIDTH) for n in range(7)]
    stack = torch.stack([module.delta() for module in made(form, squares)])
    rank = [int(torch.linalg.matrix_rank(stack.movedim(mode, 0).flatten(1))) for mode in range(3)]
    assert rank == [across, 3, 3]


def test_check_1_parameter_counts_of_a_vit_b_16() -> None:
    shapes = [("query", 1, 1), ("key", 1, 1), ("value", 1, 1), ("output", 1, 1), ("up", 4, 1), ("down", 1, 4)]
    with torch.device("meta"):
        sites = [by_hand.linear(name, 768 * o, 768 * i) for _ in range(12) for name, o, i in shapes]
        assert by_hand.count(by_hand.build(FacT(rank=16), sites)) == 61_440
        tucker = by_hand.count(by_hand.build(FacT(rank=16, decomposition="tucker"), sites))
    assert tucker == 2 * 768 * 16 + 12 * 12 * 16 + 16**3


def test_the_matrices_of_a_model_share_their_factors() -> None:
    adapter = attach(tiny("llama"), FacT(rank=3), name="fr")
    names = [name for name, _ in adapter.named_parameters()]
    assert sorted(name for name in names if name.startswith("shared.")) == ["shared.down", "shared.up"]
    assert len({id(place.graft.module.shared) for place in adapter.placed}) == 1
    assert all(name.endswith(".core") for name in names if not name.startswith("shared."))


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(BadOption, match="rank=13 is above the width 12 of the tiles"):
        by_hand.build(FacT(rank=13), SITES)
