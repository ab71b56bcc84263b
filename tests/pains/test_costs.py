"""Pains of cost, measured by counting bytes and operations, never by a clock."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import graftwork as gw
from graftwork.engine.route import Route
from graftwork.engine.routed import Rows
from graftwork.errors import BadOption, NothingMatches, PortUnavailable, UnknownName
from graftwork.reference.catalogue import techniques
from graftwork.testing import tiny, tiny_batch

from .kit import Operations, batch, grafted, llama, logits, python_calls, saved_bytes

ROWS, LENGTH, LAYERS, WIDTH, INNER = 4, 32, 2, 32, 64


def kept(dtype: torch.dtype, technique: object = None, train: bool = False) -> int:
    """Bytes kept for backward; without a technique those of full fine-tuning."""
    model = llama().to(dtype).train(train)
    if technique is not None:
        gw.attach(model, technique)
    inputs = batch(batch=ROWS, length=LENGTH)

    def forward() -> Tensor:
        return model(**inputs, use_cache=False).logits.float().square().mean()

    return saved_bytes(forward, [*model.parameters(), *model.buffers(), *inputs.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pain_12_projections_that_read_one_tensor_keep_it_once(dtype: torch.dtype) -> None:
    size = torch.finfo(dtype).bits // 8
    query = kept(dtype, gw.LoRA(rank=2, workspaces=["attention.query"]))
    three = kept(dtype, gw.LoRA(rank=2, workspaces=["attention.query", "attention.key", "attention.value"]))
    both = kept(dtype, gw.LoRA(rank=2, workspaces=["attention.query", "feedforward.gate", "feedforward.up"]))
    down = kept(dtype, gw.LoRA(rank=2, workspaces=["attention.query", "feedforward.down"]))
    assert three == query
    assert both - query == LAYERS * ROWS * LENGTH * WIDTH * size
    assert down - query == LAYERS * ROWS * LENGTH * INNER * size


def test_pain_12_low_rank_keeps_less_than_full_fine_tuning_whatever_the_base_is_stored_in() -> None:
    technique = gw.LoRA(rank=2, workspaces=["all-linear"])
    fp32, bf16 = kept(torch.float32, technique), kept(torch.bfloat16, technique)
    assert fp32 < 0.85 * kept(torch.float32)
    assert bf16 < 0.85 * kept(torch.bfloat16)
    assert bf16 < 0.65 * fp32  # fp32 adapter tensors beside a bf16 base make no fp32 copies of activations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pain_13_dropout_keeps_no_mask_and_no_masked_copy(dtype: torch.dtype) -> None:
    plain, dropped = (gw.LoRA(rank=2, workspaces=["all-linear"], dropout=p) for p in (0.0, 0.1))
    assert kept(dtype, dropped, train=True) == kept(dtype, plain, train=True)


def test_pain_13_and_the_mask_is_still_one() -> None:
    """Without this the test above would pass on a dropout that does nothing."""
    model = llama().train()
    grafted(model, gw.LoRA(rank=2, dropout=0.5))
    assert not torch.equal(logits(model, batch()), logits(model, batch()))


@pytest.mark.parametrize(
    "name", [name for name in ("lora", "dora", "balora", "kasa") if name in techniques()]
)
def test_pain_14_no_matrix_of_the_size_of_the_weight_is_built(name: str) -> None:
    layer = nn.Linear(48, 40)
    model = nn.Sequential(layer)
    grafted(model, gw.make(name, {"rank": 2, "workspaces": ["*"]}))
    x = torch.randn(5, 48, requires_grad=True)
    with Operations() as operations:
        model(x).square().mean().backward()
    assert not [seen for seen in operations.seen if seen[1] == (40, 48)]
    assert layer.weight.grad is None


FULL = ("_linalg_svd", "linalg_qr", "_linalg_eigh", "linalg_eig", "geqrf")


STARTS_FROM_A_DECOMPOSITION = {"ba-lora", "kasa", "loreft"}  # LoReFT's is of its own thin matrix


@pytest.mark.parametrize("name", sorted(set(techniques()) - STARTS_FROM_A_DECOMPOSITION))
def test_pain_15_attaching_decomposes_no_weight(name: str) -> None:
    model = tiny("bert")
    with Operations() as operations:
        try:
            gw.attach(model, gw.make(name, {}))
        except (NothingMatches, PortUnavailable, BadOption) as refusal:
            pytest.skip(str(refusal))
    assert operations.count(*FULL) == 0


@pytest.mark.parametrize(
    "technique",
    [
        gw.LoRA(rank=2),
        gw.IA3(),
        gw.BottleneckAdapter(width=4),
        gw.SSF(),
        gw.PrefixTuning(length=3, hidden=None),
    ],
    ids=lambda technique: technique.name,
)
def test_pain_17_one_batch_serves_several_adapters_with_any_technique(technique: gw.Technique) -> None:
    model, inputs = tiny("t5"), tiny_batch("t5", batch=4)
    for seed, name in enumerate(("ann", "bob")):
        grafted(model, technique, name, seed)
    alone = {}
    for number, names in ((-1, ()), (0, ("ann",)), (1, ("bob",))):
        with gw.active(model, *names):
            alone[number] = logits(model, inputs)
    index = [1, -1, 0, 1]
    with gw.route(model, ["ann", "bob"], torch.tensor(index)):
        mixed = logits(model, inputs)
    wanted = torch.stack([alone[number][row] for row, number in enumerate(index)])
    torch.testing.assert_close(mixed, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("host", ["t5", "llama"])
def test_pain_17_beam_search_keeps_each_rows_adapter(host: str) -> None:
    model, inputs = tiny(host), batch(host, batch=3)
    inputs.pop("decoder_input_ids", None)
    for seed, name in enumerate(("ann", "bob")):
        grafted(model, gw.LoRA(rank=2, workspaces=["all-linear"]), name, seed, head=False)
    options = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    alone = {}
    for number, names in ((-1, ()), (0, ("ann",)), (1, ("bob",))):
        with gw.active(model, *names):
            alone[number] = model.generate(**inputs, **options)
    with gw.route(model, ["ann", "bob"], torch.tensor([1, -1, 0])):
        mixed = model.generate(**inputs, **options)
    assert torch.equal(mixed, torch.stack([alone[1][0], alone[-1][1], alone[0][2]]))


def test_pain_17_an_unknown_name_in_a_route_is_refused() -> None:
    model = llama()
    gw.attach(model, gw.LoRA(rank=2), name="ann")
    with pytest.raises(UnknownName, match="ann"):
        gw.route(model, ["ann", "anne"], torch.tensor([0, 1]))


def test_pain_17_the_index_is_laid_out_once_per_forward_not_once_per_layer(monkeypatch) -> None:
    model = tiny("llama", {"num_hidden_layers": 4})
    grafted(model, gw.LoRA(rank=2, workspaces=["all-linear"]), "ann")
    laid_out: Counter[tuple[int, int | None]] = Counter()
    real = Route._lay_out

    def counted(self: Route, rows: int, tokens: int | None) -> Tensor:
        laid_out[rows, tokens if self.per_token else None] += 1
        return real(self, rows, tokens)

    def prepared(index: Tensor, count: int) -> Rows:
        laid_out[-1, None] += 1
        return prepare(index, count)

    prepare = Rows.of
    monkeypatch.setattr(Route, "_lay_out", counted)
    monkeypatch.setattr(Rows, "of", prepared)
    with gw.route(model, ["ann"], torch.tensor([0, -1, 0])):
        logits(model, batch())
    assert laid_out
    assert max(laid_out.values()) == 1


@pytest.mark.parametrize("length", [1, 9])
def test_pain_17_eight_adapters_take_as_many_products_as_two(length: int) -> None:
    """A loop over adapters would take four times as many."""
    products = {}
    for number in (2, 8):
        model, inputs = llama(), batch(batch=8, length=length)
        names = [f"a{i}" for i in range(number)]
        for seed, name in enumerate(names):
            grafted(model, gw.LoRA(rank=2), name, seed)
        with gw.route(model, names, torch.arange(8) % number), torch.no_grad(), Operations() as operations:
            model(**inputs)
        products[number] = operations.count("mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_")
    assert products[8] == products[2]


def test_pain_18_the_64th_adapter_is_added_and_switched_to_like_the_second() -> None:
    model = llama()
    gw.attach(model, gw.LoRA(rank=2), name="a0")
    gw.active(model, "a0")  # what is imported on first use is no cost of a switch
    calls = {}
    for number in range(1, 64):
        name = f"a{number}"
        added = python_calls(lambda name=name: gw.attach(model, gw.LoRA(rank=2), name=name))
        switched = python_calls(lambda name=name: gw.active(model, name))
        calls[number] = added, switched
    assert calls[63][0] <= 1.02 * calls[1][0]
    assert calls[63][1] <= calls[1][1]
    removed = [python_calls(lambda name=name: gw.detach(model, name)) for name in ("a63", "a1")]
    assert max(removed) <= 1.1 * min(removed)


def test_pain_18_a_forward_pays_for_the_active_adapter_only() -> None:
    model, inputs = llama(), batch()
    grafted(model, gw.LoRA(rank=2), "a0")
    logits(model, inputs)
    counts = []
    for number in (1, 20):
        for extra in range(len(gw.adapters(model)), number):
            grafted(model, gw.LoRA(rank=2), f"a{extra}")
        gw.active(model, "a0")
        gw.trainable(model)
        logits(model, inputs)
        counts.append(python_calls(lambda: logits(model, inputs)))
    assert counts[1] <= 1.02 * counts[0]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("bias", [True, False])
def test_pain_next_the_fused_path_does_not_fall_away(dropout: float, bias: bool) -> None:
    """With dropout and with a bias it is one function all the same, which keeps its input only."""
    model = nn.Sequential(nn.Linear(8, 6, bias=bias)).train()
    grafted(model, gw.LoRA(rank=2, dropout=dropout, workspaces=["*"]))
    x = torch.randn(3, 8, requires_grad=True)
    out = model(x)
    assert type(out.grad_fn).__name__ == "_LowRankLinearBackward"
    assert saved_bytes(lambda: model(x), [x, *model.parameters()]) == 0


def test_pain_next_compiled_whole_and_switched_without_new_graphs() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(3, 8)
    for seed, name in enumerate(("ann", "bob")):
        grafted(model, gw.LoRA(rank=2, workspaces=["*"]), name, seed)
    gw.trainable(model)
    wanted = {}
    for name in ("ann", "bob"):
        with gw.active(model, name):
            wanted[name] = model(x)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        for name in ("ann", "bob"):
            gw.active(model, name)
            torch.testing.assert_close(compiled(x), wanted[name])
    assert counter.frame_count <= 2  # one graph an adapter, none on coming back
    torch._dynamo.reset()
