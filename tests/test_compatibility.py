"""The table of docs/compatibility.md, found by attaching, running and training; `python tests/test_compatibility.py`
renews it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import graftwork as gw
from graftwork.errors import NothingMatches, PortUnavailable
from graftwork.laws import answer, stir
from graftwork.reference.technique import Technique
from graftwork.testing import FAMILIES, tiny, tiny_batch

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
PORTS: dict[str, Technique] = {
    "weight (LoRA)": gw.LoRA(rank=2),
    "hidden (bottleneck adapter)": gw.BottleneckAdapter(width=4),
    "attention (prefix tuning)": gw.PrefixTuning(length=2, hidden=None),
    "sequence (prompt tuning)": gw.PromptTuning(length=2),
}


def verdict(family: str, technique: Technique) -> str:
    """Where the technique went on a tiny model of the family, or why it was refused."""
    model, batch = tiny(family), tiny_batch(family)
    try:
        adapter = gw.attach(model, technique, head=False)
    except (PortUnavailable, NothingMatches) as reason:
        return f"refused: {short(str(reason))}"
    stir(adapter)
    answer(model, batch).square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    places = sorted({site.workspace for site in adapter.sites.values()})
    return ", ".join(f"`{place}`" for place in places)


def short(reason: str) -> str:
    """The refusal without the model's class in front and the list of workspaces behind."""
    return reason.split(". Its workspaces")[0].partition("port: ")[2].partition(": ")[2] or reason


def row(family: str) -> str:
    torch.set_num_threads(1)
    return f"| {family} | {' | '.join(verdict(family, technique) for technique in PORTS.values())} |"


def table() -> Iterator[str]:
    yield f"| family | {' | '.join(PORTS)} |"
    yield "| --- " * (len(PORTS) + 1) + "|"
    yield from map(row, FAMILIES)


def renew() -> None:
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text(head + "\n".join([BEGIN, *table(), END]) + tail, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_says_where_each_port_goes(family: str) -> None:
    assert row(family) in PAGE.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    renew()
