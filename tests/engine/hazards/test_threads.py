"""Two threads, two active sets, one model: answers are those of one thread alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.errors import StateError

from .kit import PROJECTIONS, batch, grafted, llama


def _served() -> nn.Module:
    model = llama()
    grafted(model, gw.LoRA(rank=2, workspaces=PROJECTIONS), "a", verify=False)
    grafted(model, gw.IA3(), "b", seed=2, verify=False)
    return model


def _answers(
    model: nn.Module, choices: list[tuple[str, ...]], rounds: int
) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    inputs, barrier = batch(), threading.Barrier(len(choices))

    def serve(names: tuple[str, ...]) -> list[tuple[tuple[str, ...], torch.Tensor]]:
        torch.set_num_threads(1)
        barrier.wait()
        out = []
        for _ in range(rounds):
            with gw.active(model, *names), torch.no_grad():
                out.append((names, model(**inputs).logits))
        return out

    with ThreadPoolExecutor(len(choices)) as pool:
        return [answer for part in pool.map(serve, choices) for answer in part]


def test_threads_with_their_own_sets():
    model, choices = _served(), [("a",), ("b",), ("a", "b"), ()]
    alone = {}
    for names in choices:
        with gw.active(model, *names), torch.no_grad():
            alone[names] = model(**batch()).logits
    answers = _answers(model, choices, rounds=15)
    assert len(answers) == 60
    assert all(torch.equal(logits, alone[names]) for names, logits in answers)
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, alone["b",])


def test_threads_with_routes_and_the_home_thread_switching():
    model, inputs = _served(), batch()
    with gw.route(model, ["a", "b"], torch.tensor([0, 1, -1])), torch.no_grad():
        routed = model(**inputs).logits
    stop = threading.Event()

    def serve() -> list[torch.Tensor]:
        torch.set_num_threads(1)
        out = []
        while not stop.is_set() or not out:
            with gw.route(model, ["a", "b"], torch.tensor([0, 1, -1])), torch.no_grad():
                out.append(model(**inputs).logits)
        return out

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(serve)
        own = []
        for names in [("a",), (), ("b",)] * 5:
            gw.active(model, *names)
            with torch.no_grad():
                own.append((names, model(**inputs).logits))
        stop.set()
        answers = waiting.result()
    assert all(torch.equal(logits, routed) for logits in answers)
    for names, logits in own:
        gw.active(model, *names)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, logits)


def test_a_statement_at_home_holds_everywhere_and_elsewhere_only_there():
    model = _served()
    seen = {}

    def worker() -> None:
        with torch.no_grad():
            seen["before"] = model(**batch()).logits
            gw.active(model, "b")
            seen["own"] = model(**batch()).logits

    gw.active(model, "a")
    thread = threading.Thread(target=worker)
    thread.start()
    thread.join()
    with torch.no_grad():
        here = model(**batch()).logits
        gw.active(model, "b")
        assert torch.equal(model(**batch()).logits, seen["own"])
    assert torch.equal(seen["before"], here)
    assert not torch.equal(seen["own"], here)


def test_a_choice_of_something_detached_is_refused():
    model, start, go = _served(), threading.Event(), threading.Event()

    def worker() -> None:
        gw.active(model, "a")
        start.set()
        go.wait()
        with torch.no_grad():
            model(**batch())

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(worker)
        start.wait()
        gw.detach(model, "a")
        go.set()
        with pytest.raises(StateError, match="'a' was detached"):
            waiting.result()


def test_compiled_threads_are_refused_or_run_uncompiled():
    model = _served()
    compiled = torch.compile(model, backend="eager")
    strict = torch.compile(model, backend="eager", fullgraph=True)
    with gw.active(model, "a"), torch.no_grad():
        alone = model(**batch()).logits
    out = {}

    def worker() -> None:
        with gw.active(model, "a"), torch.no_grad():
            out["loose"] = compiled(**batch()).logits
            torch._dynamo.reset()
            try:
                strict(**batch())
            except Exception as error:
                out["strict"] = str(error)

    thread = threading.Thread(target=worker)
    thread.start()
    thread.join()
    assert torch.equal(out["loose"], alone)
    assert "several threads" in out["strict"]
    torch._dynamo.reset()
