"""Mixed precision, transforms of torch.func, inference mode, the meta device."""

import pytest
import torch
from torch import Tensor, nn

import graftwork as gw

from .kit import PROJECTIONS, batch, gradients, grafted, largest_gap, llama, loss_of, techniques


def _saved(model: nn.Module) -> list[Tensor]:
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, batch(batch=4, length=16))
    return list(kept.values())


@pytest.mark.parametrize("name", techniques())
def test_a_bf16_base_keeps_no_more_fp32_than_it_does_alone(name):
    """What is wide (batch x tokens x channels) and fp32 is the base's own (norms, logits), none of the
    adapter's."""
    bare = llama().to(torch.bfloat16)
    bare.model.embed_tokens.weight.requires_grad_(True)

    def wide(model: nn.Module) -> int:
        return sum(t.numel() for t in _saved(model) if t.dtype == torch.float32 and t.numel() >= 4 * 16 * 32)

    model = llama().to(torch.bfloat16)
    adapter = grafted(model, techniques()[name])
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    assert model(**batch()).logits.dtype == torch.bfloat16
    loss_of(model, batch()).backward()
    assert {parameter.grad.dtype for parameter in adapter.parameters()} == {torch.float32}
    assert wide(model) <= wide(bare)


@pytest.mark.parametrize("name", techniques())
def test_autocast_is_close_to_full_precision(name):
    wanted, got = [], []
    for casting, out in ((False, wanted), (True, got)):
        model = llama()
        adapter = grafted(model, techniques()[name])
        with torch.autocast("cpu", torch.bfloat16, enabled=casting):
            loss = loss_of(model, batch())
        loss.backward()
        out += [loss.detach(), gradients(adapter)]
    torch.testing.assert_close(wanted[0], got[0], atol=0.05, rtol=0.02)
    for key, value in wanted[1].items():
        assert got[1][key].dtype == torch.float32
        assert (value - got[1][key]).norm() <= 0.1 * value.norm()


def test_an_adapter_made_in_inference_mode_trains():
    model = llama()
    with torch.inference_mode():
        adapter = grafted(model, gw.LoRA(rank=2, workspaces=PROJECTIONS))
        wanted = model(**batch()).logits
    loss_of(model, batch()).backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert torch.equal(model(**batch()).logits, wanted)


def test_on_the_meta_device():
    with torch.device("meta"):
        model = llama()
    adapter = gw.attach(model, gw.LoRA(rank=2, workspaces=PROJECTIONS))
    assert {parameter.device.type for parameter in adapter.parameters()} == {"meta"}
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    assert model(input_ids=ids).logits.shape == (2, 5, 99)
    real = llama()
    gw.attach(real, gw.LoRA(rank=2, workspaces=PROJECTIONS))
    model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict())


def _small() -> tuple[nn.Module, gw.Adapter, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, grafted(model, gw.LoRA(rank=2, workspaces=("re:[02]",))), torch.randn(3, 4)


def test_functional_call_and_gradients_of_it():
    model, adapter, x = _small()
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    mine = {names[id(parameter)]: parameter.detach() for parameter in adapter.parameters()}

    def loss(values: dict[str, Tensor], rows: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (rows,)).pow(2).sum()

    got = torch.func.grad(loss)(mine, x)
    model(x).pow(2).sum().backward()
    for parameter in adapter.parameters():
        torch.testing.assert_close(got[names[id(parameter)]], parameter.grad)
    per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(mine, x.unsqueeze(1))
    for key, value in got.items():
        torch.testing.assert_close(per_row[key].sum(0), value)


def test_vmap_over_stacked_adapters():
    model, adapter, x = _small()
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    mine = {names[id(parameter)]: parameter.detach() for parameter in adapter.parameters()}
    stacked = {key: torch.stack([value, 2 * value, -value]) for key, value in mine.items()}
    call = torch.func.vmap(lambda values: torch.func.functional_call(model, values, (x,)))
    out = call(stacked)
    for number in range(3):
        one = {key: value[number] for key, value in stacked.items()}
        torch.testing.assert_close(out[number], torch.func.functional_call(model, one, (x,)))


def test_double_precision_all_the_way():
    model = llama().double()
    adapter = grafted(model, gw.LoRA(rank=2, workspaces=PROJECTIONS))
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float64}
    loss_of(model, batch()).backward()


def test_a_copy_on_the_fly_in_float64_agrees():
    import copy

    model = llama()
    adapter = grafted(model, gw.LoRA(rank=2, workspaces=PROJECTIONS))
    twin = copy.deepcopy(model).double()
    loss_of(model, batch()).backward()
    loss_of(twin, batch()).backward()
    exact = {key: value.float() for key, value in gradients(gw.adapters(twin)["default"]).items()}
    assert largest_gap(gradients(adapter), exact) < 1e-5


def test_gradients_asked_for_by_name_are_not_missed_in_grad():
    """torch.autograd.grad fills no `.grad`; that is not "no gradient", and a later backward is still
    checked."""
    model, adapter, x = _small()
    x.requires_grad_(True)
    wanted = list(adapter.parameters())
    got = torch.autograd.grad(model(x).sum(), wanted)
    torch.autograd.grad(model(x).sum(), [x])
    model(x).sum().backward()
    for value, parameter in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, parameter.grad)
