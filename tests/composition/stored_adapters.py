"""Handmade adapters as files hold them, with the numbers of the checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graftwork.adapters.base import BaseIdentity, Sample
from graftwork.adapters.manifest import Owner, Place
from graftwork.adapters.stored import StoredAdapter, assemble
from graftwork.composition.methods import Method
from graftwork.composition.operands import Operand, Term
from graftwork.composition.parameters import Parameters
from graftwork.composition.verbs import composed
from graftwork.reference.technique import Technique
from graftwork.techniques.ia3 import IA3
from graftwork.techniques.lora import LoRA

KEY = "0/attention.query"
PLACE = Place("layers.0.q", "Linear", "weight", "output", "linear", layer=0, width_in=2)
BASE = BaseIdentity("Bert", "bert", {"heads": 2}, {"2x2": 1}, (Sample((2, 2), "float32", (0.5, -1.25)),))
Rows = Sequence[Sequence[float]]


def stored(
    technique: Technique,
    tensors: Mapping[str, Tensor],
    *,
    key: str = KEY,
    base: BaseIdentity = BASE,
    name: str = "x",
) -> StoredAdapter:
    """An adapter of one technique at one site."""
    owned = {Owner(0, key, own): tensor for own, tensor in tensors.items()}
    return assemble(name, (technique,), owned, {key: PLACE}, base)


def lora(down: Rows, up: Rows, **options: float) -> StoredAdapter:
    """A LoRA of scale 1 with these factors."""
    tensors = {"down": torch.tensor(down, dtype=torch.float64), "up": torch.tensor(up, dtype=torch.float64)}
    return stored(LoRA(rank=len(down), **options), tensors)  # type: ignore[arg-type]


def ia3(scale: Sequence[float]) -> StoredAdapter:
    """(IA)3 with this vector."""
    return stored(IA3(), {"scale": torch.tensor(scale, dtype=torch.float64)})


def total(*terms: tuple[float, StoredAdapter], method: Method | None = None) -> dict[str, Tensor]:
    """The tensors of a weighted sum, by their own names."""
    given = [Term(weight, Operand(f"x{number}", adapter)) for number, (weight, adapter) in enumerate(terms)]
    summed, _ = composed(given, "sum", method or Parameters())
    return {owner.name: tensor for owner, tensor in summed.owned().items()}


def update(tensors: Mapping[str, Tensor]) -> Tensor:
    """up @ down of a LoRA of scale 1."""
    return tensors["up"] @ tensors["down"]
