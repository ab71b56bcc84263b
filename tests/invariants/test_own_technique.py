"""A technique written as a user would, outside the package, in one place: it gets everything the others have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
import torch
from torch import Tensor, nn

import graftwork as gw
from graftwork.engine.modules import LowRankModule
from graftwork.laws import LAWS
from graftwork.reference import catalogue
from graftwork.reference.card import Card
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, IntraConnectivity
from graftwork.reference.site import Site
from graftwork.reference.technique import AtLeast, Technique


@dataclass(frozen=True, kw_only=True)
class CosineLoRA(Technique, name="cosine-lora"):
    """A low-rank update whose first factor is a fixed cosine basis; only the second one trains."""

    published: ClassVar[Card] = Card(
        intra_connectivity=IntraConnectivity.LINEAR,
        adaptation=Adaptation.REPARAMETERISATION,
        input=Input.HIDDEN,
        insertion=Insertion.PARALLEL,
        integration=Integration.SCALED_ADDITION,
        workspaces=("attention.query|ssm.in|conv|linear",),
        linear=True,
        identity_at_init=True,
        formula="y = W x + B C x, C a cosine basis",
        parameters="rank out per matrix",
        citation="this test",
    )

    rank: Annotated[int, AtLeast(1)] = 4

    def build(self, site: Site) -> nn.Module:
        return Cosine(site.width_in, site.width_out, self.rank)


class Cosine(LowRankModule):
    def __init__(self, width_in: int, width_out: int, rank: int) -> None:
        super().__init__()
        steps = torch.arange(width_in).float() + 0.5
        waves = torch.cos(torch.outer(torch.arange(rank).float() + 1, steps) * torch.pi / width_in)
        self.register_buffer("down", waves * (2 / width_in) ** 0.5)
        self.up = nn.Parameter(torch.zeros(width_out, rank))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    catalogue.register(CosineLoRA)
    yield
    del catalogue._registered["cosine-lora"]


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("host", ["bert", "llama", "gpt2", "t5", "vit", "mamba", "resnet"])
def test_law(law: str, host: str) -> None:
    LAWS[law](host, CosineLoRA(rank=3))


def test_it_is_known_by_name() -> None:
    assert gw.make("cosine-lora", {"rank": 2}) == CosineLoRA(rank=2)
    assert gw.CosineLoRA is CosineLoRA
    assert "cosine-lora" in gw.techniques()
