"""torch's own layers: fast paths that skip modules, weights that are read, odd convolutions and tables."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graftwork as gw
from graftwork.errors import GraftworkError, NoGradient, PortUnavailable
from graftwork.testing import tiny

from .kit import batch, grafted, loss_of


def _encoder(layers: int = 2) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, layers).eval()


def _techniques() -> dict[str, object]:
    return {
        "lora linear1": gw.LoRA(rank=2, workspaces=(r"re:.*linear1",)),
        "lora out_proj": gw.LoRA(rank=2, workspaces=(r"re:.*out_proj",)),
        "dense linear2": gw.FineTuning(workspaces=(r"re:.*linear2",)),
        "bias": gw.BitFit(workspaces=(r"re:.*linear\d",)),
        "bias out_proj": gw.BitFit(workspaces=(r"re:.*out_proj",)),
        "norm": gw.NormTuning(workspaces=(r"re:.*norm1",)),
        "ia3 linear1": gw.IA3(workspaces=(r"re:.*linear1",)),
        "bottleneck linear2": gw.BottleneckAdapter(width=4, workspaces=(r"re:.*linear2",)),
        "in_proj": gw.LoRA(rank=2, workspaces=("attention.qkv",)),
    }


PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", _techniques())
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fast_path_agrees_with_the_slow_one(name, padded):
    model, x = _encoder(), torch.randn(2, 5, 16)
    mask = {"src_key_padding_mask": PADDED} if padded else {}
    keep = ~PADDED if padded else torch.ones_like(PADDED)
    with torch.no_grad():
        bare = model(x, **mask)
    grafted(model, _techniques()[name])
    slow = model(x, **mask)
    with torch.no_grad():
        fast = model(x, **mask)
        again = model(x, **mask)
    torch.testing.assert_close(fast[keep], slow[keep])
    assert torch.equal(fast, again)
    assert (fast - bare)[keep].abs().max() > 1e-4
    gw.detach(model)
    with torch.no_grad():
        assert torch.equal(model(x, **mask), bare)


@pytest.mark.parametrize("name", _techniques())
def test_every_tensor_is_trained(name):
    model = _encoder().train()
    adapter = grafted(model, _techniques()[name])
    model(torch.randn(2, 5, 16)).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())


def _attention() -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(16, 2, batch_first=True).eval()


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = _attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_out_proj_and_in_proj_against_folded_weights():
    x = torch.randn(2, 5, 16)
    for pattern, parameter in ((r"re:.*out_proj", "out_proj.weight"), (r"re:attention", "in_proj_weight")):
        model = Around().eval()
        adapter = grafted(model, gw.LoRA(rank=2, workspaces=(pattern,)))
        (graft,) = adapter.modules.values()
        plain = _attention()
        with torch.no_grad():
            plain.get_parameter(parameter).add_(graft.delta())
        wanted = plain(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(model(x), wanted)
        with torch.no_grad():
            torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("technique", [gw.IA3, gw.BottleneckAdapter])
def test_a_hidden_module_on_out_proj_is_refused(technique):
    with pytest.raises(PortUnavailable, match="out_proj"):
        gw.attach(Around(), technique(workspaces=(r"re:.*out_proj",)))


def test_a_routed_batch_through_a_weight_that_is_read():
    model, x = _encoder(1), torch.randn(3, 5, 16)
    for number, name in enumerate("ab"):
        grafted(model, gw.LoRA(rank=2, workspaces=(r"re:.*out_proj",)), name, seed=number)
    rows = []
    for names in (("a",), ("b",), ()):
        with gw.active(model, *names):
            rows.append(model(x))
    with gw.route(model, ["a", "b"], torch.tensor([1, -1, 0])):
        torch.testing.assert_close(model(x), torch.stack([rows[1][0], rows[2][1], rows[0][2]]))
        with torch.no_grad():
            torch.testing.assert_close(model(x), torch.stack([rows[1][0], rows[2][1], rows[0][2]]))


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3, padding=1),
    "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "reflect": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4, padding="same"),
    "strided": nn.Conv2d(4, 6, (3, 2), stride=2, dilation=2, bias=False),
    "one axis": nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"),
    "three axes": nn.Conv3d(4, 6, 2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("kind", ["lora", "fine-tuning", "bitfit"])
def test_convolutions_against_the_dense_definition(name, kind):
    if kind == "bitfit" and CONVOLUTIONS[name].bias is None:
        pytest.skip("no bias")
    import copy

    layer = copy.deepcopy(CONVOLUTIONS[name])
    model = nn.Sequential(layer)
    axes = layer.weight.dim() - 2
    x = torch.randn(2, 4, *(6,) * axes)
    made = {"lora": gw.LoRA(rank=2, workspaces=("re:0",)), "bitfit": gw.BitFit(workspaces=("re:0",))}
    adapter = grafted(model, made.get(kind) or gw.FineTuning(workspaces=("re:0",)))
    (graft,) = adapter.modules.values()
    plain = copy.deepcopy(CONVOLUTIONS[name])
    with torch.no_grad():
        if kind == "lora":
            plain.weight += graft.delta().reshape(plain.weight.shape)
        elif kind == "bitfit":
            plain.bias += graft.delta
        else:
            plain.weight.copy_(graft.weight.reshape(plain.weight.shape))
            if plain.bias is not None:
                plain.bias.copy_(graft.bias)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_a_transposed_convolution_is_right_or_refused(kind):
    import copy

    layer = kind(4, 6, 3)
    model, plain = nn.Sequential(copy.deepcopy(layer)), copy.deepcopy(layer)
    x = torch.randn(2, 4, *(5,) * (layer.weight.dim() - 2))
    try:
        adapter = grafted(model, gw.LoRA(rank=2, workspaces=("re:0",)))
    except GraftworkError:
        return
    report = gw.merge(model)
    merged = model(x)
    gw.unmerge(model)
    assert report.weights == 1
    torch.testing.assert_close(model(x), merged)
    assert not torch.allclose(model(x), plain(x))
    assert adapter.count() > 0


def test_an_embedding_with_a_largest_norm():
    """torch rewrites such a table in place at each forward: the base's own doing, with or without an
    adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0))
    plain = nn.Embedding(9, 4, max_norm=1.0)
    plain.load_state_dict(model[0].state_dict())
    ids = torch.tensor([[1, 2], [3, 1]])
    adapter = grafted(model, gw.LoRA(rank=2, workspaces=("re:0",)))
    (graft,) = adapter.modules.values()
    wanted = (
        plain(ids) + graft.delta().T[ids] if graft.delta().shape[1] == 9 else plain(ids) + graft.delta()[ids]
    )
    torch.testing.assert_close(model(ids), wanted)
    assert torch.equal(model[0].weight, plain.weight)


def test_an_embedding_with_padding_and_sparse_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=0))
    adapter = grafted(model, gw.LoRA(rank=2, workspaces=("re:0",)))
    model(torch.tensor([[1, 2], [3, 1]])).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_an_lstm_as_a_hidden_site():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 8, batch_first=True)
            self.out = nn.Linear(8, 2)

        def forward(self, x):
            return self.out(self.rnn(x)[0])

    torch.manual_seed(0)
    model, x = Tagger(), torch.randn(2, 5, 4)
    before = model(x)
    try:
        adapter = grafted(model, gw.BottleneckAdapter(width=2, workspaces=("re:rnn",)))
    except GraftworkError:
        return
    assert not torch.equal(model(x), before)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


EXPERTS = {
    "lora": lambda: gw.LoRA(rank=2, workspaces=("experts.gate_up", "experts.down")),
    "fine-tuning": lambda: gw.FineTuning(workspaces=("experts.down",)),
}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", EXPERTS)
def test_fused_experts_against_merged_ones(name, implementation):
    model = tiny("mixtral", {"experts_implementation": implementation})
    model.config._experts_implementation = implementation
    inputs = batch("mixtral")
    bare = model(**inputs).logits
    adapter = grafted(model, EXPERTS[name]())
    out = model(**inputs).logits
    assert (out - bare).abs().max() > 1e-3
    loss_of(model, inputs).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    gw.merge(model)
    torch.testing.assert_close(model(**inputs).logits, out, atol=1e-5, rtol=1e-5)
    gw.unmerge(model)
    with gw.active(model):
        assert torch.equal(model(**inputs).logits, bare)


def test_an_output_that_no_adapter_reaches_is_told_of():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x).detach() + x

    model = Detached()
    gw.attach(model, gw.LoRA(rank=2, workspaces=("re:used",)))
    with pytest.raises(NoGradient):
        model(torch.randn(2, 4)).sum()


def test_a_functional_read_without_a_call():
    class Tied(nn.Module):
        """Uses its table at both ends, as tied language models do."""

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, ids):
            return functional.linear(self.table(ids), self.table.weight)

    torch.manual_seed(0)
    model, ids = Tied(), torch.tensor([[1, 2]])
    adapter = grafted(model, gw.LoRA(rank=2, workspaces=("re:table",)))
    gw.merge(model)
    merged = model(ids)
    gw.unmerge(model)
    torch.testing.assert_close(model(ids), merged)
    assert adapter.count() > 0
