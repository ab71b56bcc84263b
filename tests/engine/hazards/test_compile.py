"""torch.compile, export and trace: one graph, no break of ours, no graph per route or quiet fall back to
eager."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import graftwork as gw

from .kit import PROJECTIONS, batch, gradients, grafted, largest_gap, llama, loss_of, techniques

pytestmark = pytest.mark.slow

MORE = {
    "norm": lambda: gw.NormTuning(),
    "parallel": lambda: gw.BottleneckAdapter.parallel(4, 0.5),
    "ssf": lambda: gw.SSF(),
    "compacter": lambda: gw.Compacter(),
    "both ends": lambda: gw.LoRA(rank=2, workspaces=("lm_head", "embedding")),
}


def _all() -> list[str]:
    return [*techniques(), *MORE]


def _technique(name: str) -> object:
    return techniques()[name] if name in techniques() else MORE[name]()


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", _all())
def test_one_graph_forward_and_backward(name):
    model = llama(num_hidden_layers=1)
    adapter = grafted(model, _technique(name))
    loss_of(model, batch()).backward()
    wanted_logits, wanted = model(**batch()).logits, gradients(adapter)
    for parameter in adapter.parameters():
        parameter.grad = None
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    loss_of(compiled, batch()).backward()
    assert counter.frame_count == 1
    assert largest_gap(gradients(adapter), wanted) < 1e-5
    torch.testing.assert_close(compiled(**batch()).logits, wanted_logits)


def test_training_compiled_equals_training_plain():
    values = []
    for compiling in (False, True):
        model = llama(num_hidden_layers=1).train()
        adapter = grafted(model, gw.LoRA(rank=2, workspaces=PROJECTIONS))
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiling else model
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(run, batch()).backward()
            optimizer.step()
        values.append(adapter.tensors())
    assert largest_gap(*values) < 1e-4


def test_compiled_with_checkpointing():
    """One graph, without transformers' hook on the embeddings, which breaks graphs on a frozen base."""
    values = []
    for compiling in (False, True):
        model = llama(num_hidden_layers=1).train()
        adapter = grafted(model, gw.LoRA(rank=2, workspaces=PROJECTIONS))
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiling else model
        loss_of(run, batch()).backward()
        values.append(gradients(adapter))
    assert largest_gap(*values) < 1e-5


def test_per_layer_compilation():
    model = llama(num_hidden_layers=1)
    grafted(model, gw.LoRA(rank=2, workspaces=PROJECTIONS))
    wanted = model(**batch()).logits
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(**batch()).logits, wanted)


def test_switching_the_active_set_compiles_once_for_each_set():
    model = llama(num_hidden_layers=1)
    for seed, name in enumerate("ab"):
        grafted(model, gw.LoRA(rank=2, workspaces=PROJECTIONS), name, seed=seed)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for names in (("a",), ("b",), (), ("a",), ("b",), ()):
        with gw.active(model, *names), torch.no_grad():
            wanted = model(**batch()).logits
            torch.testing.assert_close(compiled(**batch()).logits, wanted)
    assert counter.frame_count == 3


def _routed(names: list[str], compiled: nn.Module, model: nn.Module, index: Tensor) -> None:
    inputs = batch(batch=len(index))
    with torch.no_grad(), gw.route(model, names, index):
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


def _nine() -> tuple[nn.Module, list[str]]:
    model, names = llama(num_hidden_layers=1), [f"user{number}" for number in range(9)]
    for seed, name in enumerate(names):
        grafted(model, gw.LoRA(rank=2, workspaces=PROJECTIONS), name, seed=seed)
    return model, names


def test_nine_adapters_in_one_graph():
    model, names = _nine()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for shift in (0, 3, 7):
        _routed(names, compiled, model, (torch.arange(12) + shift) % 10 - 1)
    assert counter.frame_count == 1


def test_a_route_and_hidden_modules_in_one_graph():
    model = llama(num_hidden_layers=1)
    for seed, name in enumerate("ab"):
        technique = [gw.IA3(), gw.BottleneckAdapter(width=4, workspaces=("feedforward",))]
        grafted(model, technique, name, seed=seed)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for index in ([0, 1, -1], [1, 1, 0], [-1, -1, -1], [0, 0, 0]):
        _routed(["a", "b"], compiled, model, torch.tensor(index))
    assert counter.frame_count == 1


def test_batch_sizes_cost_no_more_graphs_than_the_bare_base():
    bare, counter = llama(num_hidden_layers=1), CompileCounter()
    compiled = torch.compile(bare, backend=counter, fullgraph=True)
    for size in (3, 4, 6):
        compiled(**batch(batch=size))
    wanted = counter.frame_count
    torch._dynamo.reset()
    model, names = _nine()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for size in (3, 4, 6):
        _routed(names, compiled, model, torch.arange(size) % 9)
    assert counter.frame_count <= wanted


def test_no_warning_of_ours(recwarn):
    model = nn.Sequential(nn.Linear(4, 4))
    grafted(model, gw.LoRA(rank=2, workspaces=("re:0",)))
    torch.compile(model, backend="eager", fullgraph=True)(torch.randn(2, 4))
    assert not [str(w.message) for w in recwarn if "graftwork" in str(w.message)]


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_export(name):
    model = llama(num_hidden_layers=1)
    grafted(model, techniques()[name])
    ids = batch()["input_ids"]
    wanted = model(ids).logits
    exported = torch.export.export(Logits(model), (ids,), strict=False)
    torch.testing.assert_close(exported.module()(ids), wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", techniques())
def test_trace(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    technique = gw.IA3 if name == "ia3" else gw.FineTuning if name == "fine-tuning" else gw.LoRA
    grafted(model, technique(workspaces=("re:[02]",)))
    x = torch.randn(3, 4)
    traced = torch.jit.trace(model, (x,), check_trace=False)
    torch.testing.assert_close(traced(x), model(x))


def test_inductor_trains():
    model = llama(num_hidden_layers=1).train()
    adapter = grafted(model, gw.LoRA(rank=2, workspaces=("attention.query",)))
    loss_of(model, batch()).backward()
    wanted = gradients(adapter)
    for parameter in adapter.parameters():
        parameter.grad = None
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    loss_of(compiled, batch()).backward()
    assert largest_gap(gradients(adapter), wanted) < 1e-4
