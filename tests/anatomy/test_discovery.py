"""Models that no table knows."""

import pytest
import torch
import transformers
from hosts import ALL, host
from torch import nn

import graftwork.anatomy.owners
from graftwork.anatomy.resolve import all_sites, anatomy_of, head_sites, select_sites
from graftwork.errors import NothingMatches, PortUnavailable
from graftwork.reference.properties import Port
from graftwork.reference.site import Access, Kind, Side
from graftwork.testing import tiny

# Where a name or shape cannot tell what a table knows.
OWN_WORDS = {
    "electra": {"embeddings_project"},
    "deberta-v2": {"rel_embeddings"},
    "t5": {"shared"},
    "mt5": {"shared"},
    "bart": {"shared"},
    "whisper": {"conv1", "conv2"},
    "dinov2": {"embeddings"},  # its mask token, never read
    "swin": {"reduction"},
    "convnext": {"1"},
}


def facts(model):
    return {
        (s.workspace, s.layer, s.module, s.parameter, s.side, s.entry, s.read_only)
        for s in all_sites(model)
        if s.channels is None
    }


@pytest.mark.parametrize("name", ALL)
def test_discovery_finds_what_the_tables_say(name, monkeypatch):
    model = host(name)
    told = facts(model)
    monkeypatch.setattr(graftwork.anatomy.owners, "families", dict)
    assert not anatomy_of(model).families
    different = facts(model) ^ told
    assert {fact[2].rpartition(".")[2] for fact in different} == OWN_WORDS.get(name, set())


def test_a_plain_sequential():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert [(s.key, s.module, s.shape) for s in all_sites(model)] == [
        ("linear", "0", (8, 4)),
        ("linear#1", "2", (3, 8)),
    ]
    assert head_sites(model) == ()
    assert len(select_sites(model, ("all-linear",))) == 2


def test_convolutions_of_every_dimension_grouped_too():
    model = nn.Sequential(
        nn.Conv1d(4, 8, 3, groups=2),
        nn.Conv2d(8, 6, (3, 5)),
        nn.Conv3d(6, 9, 2, groups=3),
        nn.GroupNorm(3, 9),
    )
    sites = all_sites(model)
    assert [s.shape for s in sites] == [(8, 6), (6, 120), (9, 16), (9,)]
    assert [(s.channels_in, s.channels_out, s.kernel) for s in sites[:3]] == [
        (4, 8, (3,)),
        (8, 6, (3, 5)),
        (6, 9, (2, 2, 2)),
    ]
    assert {s.channel_axis for s in sites} == {1}


def test_norms():
    model = nn.Sequential(
        nn.LayerNorm(4),
        nn.RMSNorm(4),
        nn.BatchNorm1d(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.LayerNorm(4, bias=False),
    )
    sites = all_sites(model)
    assert [s.kind for s in sites] == [Kind.NORM] * 5
    assert [s.channel_axis for s in sites] == [-1, -1, 1, 1, -1]
    assert [s.has_bias for s in sites] == [True, False, True, True, False]
    bare = nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.PReLU(), nn.PReLU(4), nn.ReLU())
    assert [(s.kind, s.shape) for s in all_sites(bare)] == [(Kind.TENSOR, (1,)), (Kind.TENSOR, (4,))]


def test_linears_of_other_libraries_by_their_features():
    class Packed(nn.Module):
        """A quantised linear: codes in a buffer, no weight."""

        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 6, 10
            self.register_buffer("qweight", torch.zeros(30, dtype=torch.uint8))

    (site,) = all_sites(nn.Sequential(Packed()))
    assert (site.kind, site.shape, site.has_bias) == (Kind.LINEAR, (10, 6), False)


def test_torch_encoder_layers():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    sites = {site.key: site for site in all_sites(model)}
    whole, value = sites["0/attention.qkv"], sites["0/attention.value"]
    assert (whole.kind, whole.parameter, whole.shape) == (Kind.PARAMETER, "in_proj_weight", (48, 16))
    assert (value.channels, value.fused_width, value.shape) == ((32, 48), 48, (16, 16))
    assert sites["1/attention.output"].access is Access.READ
    assert (sites["1/attention"].module, sites["1/attention"].kind) == ("layers.1.self_attn", Kind.BLOCK)
    assert (sites["0/feedforward"].entry, sites["0/feedforward"].module) == (
        "layers.0.linear1",
        "layers.0.linear2",
    )
    assert sites["0/feedforward.activation"].side is Side.INPUT


def test_torch_transformer_has_two_stacks_and_cross_attention():
    model = nn.Transformer(16, 2, 2, 2, 32)
    assert [stack.name for stack in anatomy_of(model).stacks] == ["encoder", "decoder"]
    keys = {site.key for site in all_sites(model)}
    assert {"decoder.1/cross_attention.query", "encoder.norm.final", "encoder.0/attention.qkv"} <= keys
    assert "encoder.0/cross_attention.query" not in keys


def test_attention_with_keys_of_another_width():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.linear = nn.MultiheadAttention(8, 2, kdim=4, vdim=6), nn.Linear(8, 8)

    model = nn.Sequential(Reader(), Reader())
    shapes = {s.key: s.shape for s in all_sites(model) if s.kind is Kind.PARAMETER}
    expected = {"attention.query": (8, 8), "attention.key": (8, 4), "attention.value": (8, 6)}
    assert shapes == {f"{layer}/{part}": shape for layer in (0, 1) for part, shape in expected.items()}


def test_attention_outside_layers_is_known_too():
    """Its output projection is read and never called: as a plain linear, a module there would do nothing."""
    model = nn.ModuleDict({"pool": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 3)})
    sites = {s.key: s for s in all_sites(model)}
    assert sites["attention.output"].access is Access.READ
    assert sites["attention.value"].channels == (16, 24)
    assert sites["linear"].module == "out"
    lone = {s.key: s for s in all_sites(Block())}
    assert lone["attention.qkv"].module == "qkv"
    assert lone["attention.output"].module == "proj"


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.w1, self.w2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.w3 = nn.Linear(width, 4 * width)


class Own(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.tokens, self.pos_emb = nn.Embedding(11, 8), nn.Embedding(5, 8)
        self.blocks = nn.Sequential(*[Block() for _ in range(3)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight


def test_a_decoder_written_by_hand():
    model = Own()
    workspaces = {s.key: s.module for s in all_sites(model)}
    assert workspaces["2/attention.qkv"] == "blocks.2.qkv"
    assert workspaces["0/attention.output"] == "blocks.0.proj"
    assert workspaces["1/feedforward.gate"] == "blocks.1.w1"
    assert workspaces["1/feedforward.up"] == "blocks.1.w3"
    assert workspaces["1/feedforward.down"] == "blocks.1.w2"
    assert (workspaces["embedding"], workspaces["embedding.position"]) == ("tokens", "pos_emb")
    assert workspaces["lm_head"] == "head"
    assert workspaces["norm.final"] == "norm"
    assert head_sites(model) == ()
    (stack,) = anatomy_of(model).stacks
    assert stack.causal, "a model that ends in its vocabulary may look back only"
    assert head_sites(Own(tied=True)) == ()


def test_unknown_stacks_refuse_the_sequence_port():
    with pytest.raises(PortUnavailable, match="not in the anatomy"):
        select_sites(Own(), ("embedding",), port=Port.SEQUENCE)


def test_a_convolutional_network_written_by_hand():
    class Residual(nn.Module):
        def __init__(self, inside, outside):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3), nn.BatchNorm2d(outside)
            self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3), nn.BatchNorm2d(outside)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 7), nn.BatchNorm2d(4)
            self.layer1 = nn.Sequential(Residual(4, 4), Residual(4, 4))
            self.layer2 = nn.Sequential(Residual(4, 8), Residual(8, 8))
            self.fc = nn.Linear(8, 10)

    sites = {s.key: s for s in all_sites(Net())}
    assert sites["2/conv"].module == "layer2.0.conv1"
    assert sites["3/conv#1"].module == "layer2.1.conv2"
    assert (sites["2/layer"].channels_in, sites["2/layer"].channels_out, sites["2/layer"].channel_axis) == (
        4,
        8,
        1,
    )
    assert sites["conv"].module == "conv1"
    assert [s.module for s in head_sites(Net())] == ["fc"]


UNSEEN = {
    "Albert": {"embedding_size": 16},
    "Olmo2": {},
    "Cohere": {},
    "Beit": {"image_size": 16, "patch_size": 4},
    "Nystromformer": {},
    "Granite": {},
    "StableLm": {},
}


@pytest.mark.parametrize("name", UNSEEN)
def test_families_that_have_no_table(name):
    sizes = {
        "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes, **UNSEEN[name])
    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(config)
    assert not anatomy_of(model).families
    count = 1 if name == "Albert" else 2
    for part in ("query", "key", "value", "output"):
        assert len(select_sites(model, (f"attention.{part}",))) == count
    assert len(select_sites(model, ("feedforward.down",))) == count
    assert len(select_sites(model, ("feedforward",), port=Port.HIDDEN)) == count
    assert {s.width_in for s in select_sites(model, ("feedforward.down",))} == {config.intermediate_size}


def test_expert_weights_of_an_unknown_family():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    with torch.device("meta"):
        model = transformers.OlmoeModel(transformers.OlmoeConfig(vocab_size=99, num_experts=4, **sizes))
    sites = select_sites(model, ("experts.gate_up", "experts.down", "router"), (0,))
    assert [(s.workspace, s.batch, s.shape) for s in sites] == [
        ("router", (), (4, 32)),
        ("experts.gate_up", (4,), (4, 32, 32)),
        ("experts.down", (4,), (4, 32, 16)),
    ]


def test_known_submodels_in_an_unknown_whole():
    decoder = tiny("gpt2", {"add_cross_attention": True, "is_decoder": True})
    model = transformers.VisionEncoderDecoderModel(encoder=tiny("vit-base"), decoder=decoder)
    keys = {site.key: site.module for site in all_sites(model)}
    assert keys["encoder.0/attention.query"] == "encoder.layers.0.attention.q_proj"
    assert keys["decoder.1/attention.qkv"] == "decoder.transformer.h.1.attn.c_attn"
    assert keys["decoder.0/cross_attention.output"] == "decoder.transformer.h.0.crossattention.c_proj"
    assert keys["lm_head"] == "decoder.lm_head"


def test_a_known_base_beside_layers_of_ones_own():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = tiny("bert-base")
            self.mixer = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2)

    model = Mixed()
    keys = {site.key for site in all_sites(model)}
    assert {"0/attention.query", "mixer.1/attention.qkv"} <= keys
    assert len(select_sites(model, ("mixer.feedforward.up",))) == 2
    assert len(select_sites(model, ("feedforward.up",))) == 4


def test_a_model_without_any_weight():
    with pytest.raises(PortUnavailable, match="no module there"):
        select_sites(nn.Sequential(nn.ReLU()), ("linear",))
    with pytest.raises(NothingMatches):
        select_sites(nn.Sequential(nn.Linear(2, 2)), ("attention.query",))
