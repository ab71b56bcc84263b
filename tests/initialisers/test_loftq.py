"""LoftQ: the start that makes good what quantisation lost."""

from __future__ import annotations

import copy

import nf4
import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.errors import BadOption, UnknownName
from graftwork.laws import answer, stir
from graftwork.testing import tiny, tiny_batch

WHERE = ("attention.query", "feedforward.down")


def squeezed(model: nn.Module) -> nn.Module:
    """The model with every linear of its layers rounded to NF4."""
    rough = copy.deepcopy(model)
    for layer in rough.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = nf4.rounded(module.weight.data)
    return rough


def test_nf4_reference() -> None:
    torch.testing.assert_close(nf4.quantiles(), nf4.CODES, rtol=1e-5, atol=1e-5)
    block = torch.tensor([0.1, -0.4, 0.8, 0.05])
    wanted = torch.tensor([0.12874, -0.42006, 0.8, 0.06366])
    torch.testing.assert_close(nf4.rounded(block, block=4), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["model", "state dict"])
def test_factors_are_the_best_correction_of_their_rank(source: str) -> None:
    full = tiny("llama")
    rough, before = squeezed(full), {k: v.clone() for k, v in squeezed(full).state_dict().items()}
    technique = gw.LoRA(rank=4, alpha=8, init="loftq", workspaces=WHERE)
    adapter = gw.attach(rough, technique, originals=full if source == "model" else full.state_dict())
    for place in adapter.placed:
        module, path = place.graft.module, f"{place.site.module}.weight"
        lost = full.state_dict()[path].double() - before[path].double()
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        wanted = left[:, :4] * values[:4] @ right[:4]
        torch.testing.assert_close((2 * module.up @ module.down).double(), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.up.norm(dim=0), module.down.norm(dim=1), rtol=1e-4, atol=1e-5)
    keys = [key for key in rough.state_dict() if ".grafts." not in f".{key}"]
    assert all(torch.equal(rough.state_dict()[key], before[key]) for key in keys)


def test_the_first_answer_is_nearer_to_that_of_the_original() -> None:
    full, batch = tiny("llama"), tiny_batch("llama")
    rough, wanted = squeezed(full), answer(full, batch)
    off = (answer(rough, batch) - wanted).norm()
    gw.attach(rough, gw.LoRA(rank=8, init="loftq", workspaces=("all-linear",)), originals=full)
    assert (answer(rough, batch) - wanted).norm() < 0.8 * off


def test_a_file_needs_no_originals(tmp_path) -> None:
    full, batch = tiny("llama"), tiny_batch("llama")
    rough = squeezed(full)
    stir(gw.attach(rough, gw.LoRA(rank=2, init="loftq"), originals=full))
    wanted = answer(rough, batch)
    gw.save(rough, tmp_path / "out")
    fresh = squeezed(full)
    gw.load(fresh, tmp_path / "out")
    torch.testing.assert_close(answer(fresh, batch), wanted, rtol=1e-6, atol=1e-6)


def test_originals_that_do_not_fit() -> None:
    full = tiny("llama")
    rough, technique = squeezed(full), gw.LoRA(rank=2, init="loftq", workspaces=WHERE)
    with pytest.raises(BadOption, match="needs the weights from before quantisation"):
        gw.attach(rough, technique)
    with pytest.raises(BadOption, match="nothing starts from them"):
        gw.attach(rough, gw.LoRA(rank=2), originals=full)
    with pytest.raises(BadOption, match="nothing to make good"):
        gw.attach(rough, technique, originals=rough)
    with pytest.raises(UnknownName, match=r"hold no 'model\.layers\.0"):
        gw.attach(rough, technique, originals={"other": torch.ones(2, 2)})
    packed = {key: value.to(torch.uint8) for key, value in full.state_dict().items()}
    with pytest.raises(BadOption, match="expected floating point values"):
        gw.attach(rough, technique, originals=packed)
    with pytest.raises(BadOption, match="at most 32 directions"):
        gw.attach(rough, gw.LoRA(rank=40, init="loftq", workspaces=WHERE), originals=full)
    assert type(rough.model.layers[0].self_attn.q_proj) is nn.Linear


def test_on_a_model_that_bitsandbytes_holds_in_four_bits() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    full, batch = tiny("llama"), tiny_batch("llama")
    rough = copy.deepcopy(full)
    for layer in rough.model.layers:
        own = layer.mlp.down_proj
        packed = bnb.nn.Linear4bit(own.in_features, own.out_features, bias=False, quant_type="nf4")
        packed.weight = bnb.nn.Params4bit(own.weight.data.clone(), requires_grad=False, quant_type="nf4")
        layer.mlp.down_proj = packed.to("cpu")
    try:
        answer(rough, batch)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes does not run here: {error}")
    wanted = answer(full, batch)
    off = (answer(rough, batch) - wanted).norm()
    technique = gw.LoRA(rank=16, init="loftq", workspaces=("feedforward.down",))
    module = next(iter(gw.attach(rough, technique, originals=full).modules.values()))
    weight = full.model.layers[0].mlp.down_proj.weight.detach()
    lost = weight - nf4.rounded(weight)
    left, values, right = torch.linalg.svd(lost, full_matrices=False)
    best = left[:, :16] * values[:16] @ right[:16]
    torch.testing.assert_close(module.delta().detach(), best, rtol=1e-2, atol=1e-3)
    assert (answer(rough, batch) - wanted).norm() < off
