"""VPT: vision models by hand, layer by layer, with the prompt's positions put in and replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graftwork as gw
from graftwork.errors import PortUnavailable, StateError
from graftwork.laws import stir
from graftwork.testing import tiny, tiny_batch

HOSTS = {
    "vit": ("vit", lambda core: core.layers, lambda core: core.layernorm),
    "dinov2": ("dinov2", lambda core: core.encoder.layer, lambda core: core.layernorm),
}


def first_states(host: str, model: Any, pixels: Tensor, prompts: list[Tensor]) -> Tensor:
    """(B, T, C) behind the last norm without the prompt: prompt i enters, or replaces the last one, at layer i."""
    name, layers_of, norm_of = HOSTS[host]
    core = getattr(model, name)
    hidden = core.embeddings(pixels)
    for number, layer in enumerate(layers_of(core)):
        rows = prompts[number].expand(len(hidden), -1, -1) if number < len(prompts) else None
        past = 1 + len(prompts[0]) if number else 1
        if rows is not None:
            hidden = torch.cat([hidden[:, :1], rows, hidden[:, past:]], dim=1)
        out = layer(hidden)
        hidden = out[0] if isinstance(out, tuple) else out
    hidden = norm_of(core)(hidden)
    return torch.cat([hidden[:, :1], hidden[:, 1 + len(prompts[0]) :]], dim=1)


@pytest.mark.parametrize("layers", ["shallow", "all", "first 1"])
@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_positions_enter_once_or_are_replaced_at_each_layer(host: str, layers: str) -> None:
    torch.manual_seed(0)
    model, pixels = tiny(f"{host}-base"), tiny_batch(host)["pixel_values"]
    deep = layers != "shallow"
    plain: Any = tiny(host)
    technique = gw.VPT(length=3, deep=deep, layers=layers if deep else "all")
    adapter = gw.attach(model, technique)
    stir(adapter)
    prompts = [module.prompt for module in adapter.modules.values()]
    by_hand = type("Holder", (), {HOSTS[host][0]: tiny(f"{host}-base")})
    expected = first_states(host, by_hand, pixels, prompts)
    torch.testing.assert_close(model(pixels).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert gw.attach(plain, technique, head=False).count() == len(prompts) * 3 * 32


def test_starts_uniform_between_the_bounds_of_the_paper() -> None:
    adapter = gw.attach(tiny("vit"), gw.VPT(length=200), head=False)
    prompt = next(adapter.parameters()).detach()
    bound = (6 / (3 * 4 * 4 + 32)) ** 0.5
    assert prompt.abs().max() <= bound
    assert prompt.std() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_drops_elements_while_training_only() -> None:
    model = tiny("vit")
    (module,) = gw.attach(model, gw.VPT(length=50, dropout=0.5), head=False).modules.values()
    assert torch.equal(module(), module.prompt)
    model.train()
    dropped = module()
    assert 0.3 < float((dropped == 0).float().mean()) < 0.7
    kept = dropped != 0
    assert torch.equal(dropped[kept], 2 * module.prompt[kept])


@pytest.mark.parametrize("deep", [False, True])
def test_windows_have_no_place_for_it(deep: bool) -> None:
    with pytest.raises(PortUnavailable, match="windows"):
        gw.attach(tiny("swin"), gw.VPT(deep=deep))


def test_deep_prompts_begin_at_the_first_layer() -> None:
    model = tiny("vit")
    gw.attach(model, gw.VPT(deep=True, layers="last 1"), head=False)
    with pytest.raises(StateError, match="first layer"):
        model(**tiny_batch("vit"))
