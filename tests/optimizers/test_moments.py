"""Moments in 8 bits against the same optimiser in fp32."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch

from graftwork.errors import BadOption
from graftwork.optimizers.galore import GaLore
from graftwork.optimizers.memory import state_bytes
from graftwork.optimizers.natural_galore import NaturalGaLore

needs_it = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (graftwork[quantised])",
)


def walked(kind: type[GaLore | NaturalGaLore], bits: int, steps: int = 30) -> tuple[float, GaLore]:
    """How far a matrix is from a target after some steps, and its optimiser."""
    torch.manual_seed(0)
    matrix, target = torch.nn.Parameter(torch.zeros(40, 64)), torch.randn(40, 64)
    optimizer = kind([{"params": [matrix], "rank": 8}], lr=0.05, refresh_interval=10, state_bits=bits)
    for _ in range(steps):
        (matrix - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return float((matrix.detach() - target).square().mean()), optimizer


@needs_it
@pytest.mark.parametrize("kind", [GaLore, NaturalGaLore])
def test_eight_bits_learn_as_32_in_a_quarter_of_the_bytes(kind: type[GaLore]) -> None:
    (wide, full), (narrow, packed) = walked(kind, 32), walked(kind, 8)
    assert narrow == pytest.approx(wide, rel=0.02)
    sizes, small = state_bytes(full), state_bytes(packed)
    assert small["exp_avg"] * 4 == sizes["exp_avg"]
    assert small["exp_avg_scale"] == small["exp_avg_sq_scale"] == 4 * (8 * 64 // 256)
    assert small["projector"] == sizes["projector"]


@needs_it
def test_a_step_is_adams_on_decoded_moments() -> None:
    """Codes are rounded, so one step from a stored state differs from the exact one by no more than that."""
    _, optimizer = walked(GaLore, 8, steps=3)
    again = copy.deepcopy(optimizer.state_dict())
    (parameter,) = optimizer.param_groups[0]["params"]
    fresh = torch.nn.Parameter(parameter.detach().clone())
    other = GaLore([{"params": [fresh], "rank": 8}], lr=0.05, refresh_interval=10, state_bits=8)
    other.load_state_dict(again)
    for one, matrix in ((optimizer, parameter), (other, fresh)):
        matrix.grad = torch.ones_like(matrix)
        one.step()
    assert torch.equal(parameter, fresh)
    assert other.state[fresh]["exp_avg"].dtype is torch.uint8


@needs_it
def test_bits_stay_what_the_state_was_started_with() -> None:
    _, optimizer = walked(GaLore, 8, steps=1)
    optimizer.param_groups[0]["state_bits"] = 32
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(BadOption, match="started with state_bits=8"):
        optimizer.step()


def test_other_widths_and_a_missing_library_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(BadOption, match="state_bits=16: take one of 8, 32"):
        GaLore([{"params": [matrix], "rank": 2}], state_bits=16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadOption, match=r"pip install 'graftwork\[quantised\]'"):
        GaLore([{"params": [matrix], "rank": 2}], state_bits=8)
