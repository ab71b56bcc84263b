"""Checkpoints, copies and pickles: base keys as ever, adapters carried along."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.testing import tiny

from .kit import PROJECTIONS, batch, grafted, llama


def _is_ours(key: str) -> bool:
    return "grafts" in key.split(".")


def _pair() -> tuple[nn.Module, nn.Module]:
    """An attached model, and another base of the same shape."""
    model = llama()
    grafted(model, gw.LoRA(rank=2, workspaces=PROJECTIONS))
    return model, tiny("llama", {}, seed=9)


def test_base_keys_and_their_order_stay():
    model, other = _pair()
    assert [key for key in model.state_dict() if not _is_ours(key)] == list(other.state_dict())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("path", ["", "model", "model.layers.1.self_attn", "model.layers.0.self_attn.q_proj"])
def test_a_base_checkpoint_loads_strictly_anywhere(path, assign):
    model, other = _pair()
    mine, theirs = model.get_submodule(path), other.get_submodule(path)
    before = {key: value for key, value in mine.named_parameters() if _is_ours(key)}
    values = {key: value.clone() for key, value in before.items()}
    report = mine.load_state_dict(theirs.state_dict(), strict=True, assign=assign)
    assert not report.missing_keys
    assert not report.unexpected_keys
    after = dict(mine.named_parameters())
    assert before
    assert all(after[key] is before[key] for key in before)
    assert all(torch.equal(after[key], values[key]) for key in before)
    assert all(torch.equal(after[key], value) for key, value in theirs.named_parameters())


def test_a_full_checkpoint_loads_into_a_copy():
    model, _ = _pair()
    other = llama()
    gw.attach(other, gw.LoRA(rank=2, workspaces=PROJECTIONS))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(**batch()).logits, model(**batch()).logits)


def test_half_an_adapter_is_missing_keys():
    model, _ = _pair()
    state = model.state_dict()
    gone = next(key for key in state if _is_ours(key))
    del state[gone]
    with pytest.raises(RuntimeError, match=gone):
        model.load_state_dict(state)


def test_a_foreign_adapter_is_unexpected_keys():
    model, other = _pair()
    with pytest.raises(RuntimeError, match="Unexpected"):
        other.load_state_dict(model.state_dict())


def test_save_pretrained_writes_a_clean_base(tmp_path):
    model, _ = _pair()
    with gw.active(model):
        wanted = model(**batch()).logits
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(loaded.eval()(**batch()).logits, wanted)


def test_an_explicit_state_dict_is_a_full_checkpoint(tmp_path):
    from safetensors.torch import load_file

    model, _ = _pair()
    model.save_pretrained(tmp_path, state_dict=None)
    kept = load_file(tmp_path / "model.safetensors")
    assert {key for key in model.state_dict() if _is_ours(key)} <= set(kept)


def test_deepcopy_is_independent():
    model, _ = _pair()
    twin = copy.deepcopy(model)
    wanted = model(**batch()).logits
    assert torch.equal(twin(**batch()).logits, wanted)
    assert type(twin) is type(model)
    gw.active(twin)
    for parameter in gw.adapters(twin)["default"].parameters():
        parameter.data.zero_()
    assert torch.equal(model(**batch()).logits, wanted)
    gw.detach(twin)
    assert type(twin).__dict__.get("_graft_base") is None
    assert torch.equal(model(**batch()).logits, wanted)


def test_a_copy_of_a_submodule_has_a_state_of_its_own():
    model, _ = _pair()
    layer = copy.deepcopy(model.model.layers[0].self_attn.q_proj)
    x = torch.randn(2, 32)
    adapted = layer(x)
    assert torch.equal(adapted, model.model.layers[0].self_attn.q_proj(x))
    gw.active(model)
    assert torch.equal(layer(x), adapted)
    base = model.model.layers[0].self_attn.q_proj(x)
    assert not torch.equal(adapted, base)


def test_copying_a_submodule_does_not_copy_the_model():
    model, _ = _pair()
    model(**batch())
    memo: dict = {}
    copy.deepcopy(model.model.layers[0].self_attn.q_proj, memo)
    assert id(model.model.embed_tokens) not in memo
    assert id(model.lm_head) not in memo


def test_pickle_in_this_process():
    model, _ = _pair()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    gw.detach(loaded)
    with gw.active(model):
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


_READ = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
out = torch.load(sys.argv[2])
torch.set_num_threads(1)
with torch.no_grad():
    torch.testing.assert_close(model(**out["inputs"]).logits, out["logits"])
import graftwork as gw
assert list(gw.adapters(model)) == ["default"]
gw.active(model)
with torch.no_grad():
    assert not torch.equal(model(**out["inputs"]).logits, out["logits"])
gw.detach(model)
assert type(model).__name__ == "LlamaForCausalLM" and "_graft" not in model.__dict__
"""


@pytest.mark.slow
def test_pickle_in_a_fresh_process(tmp_path):
    model, _ = _pair()
    torch.save(model, tmp_path / "model.pt")
    torch.save({"inputs": batch(), "logits": model(**batch()).logits.detach()}, tmp_path / "out.pt")
    command = [sys.executable, "-c", _READ, str(tmp_path / "model.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr


def test_a_parametrized_model_still_copies():
    model = nn.Sequential(nn.Linear(4, 4))
    grafted(model, gw.LoRA(rank=2, workspaces=("re:0",)))
    nn.utils.parametrizations.weight_norm(model[0])
    x = torch.randn(2, 4)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_an_averaged_model_and_shared_memory():
    model, _ = _pair()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged(**batch()).logits, model(**batch()).logits)
    model.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())


def test_to_and_half_take_the_adapter_along():
    model, _ = _pair()
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(**batch()).logits).all()
    model.to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
