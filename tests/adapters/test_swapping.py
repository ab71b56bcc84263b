"""Hot swap against loading the same file."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import graftwork as gw
from graftwork.errors import BadFile, WrongBase
from graftwork.laws import stir
from graftwork.testing import tiny, tiny_batch


def stored(
    folder: Path, technique: gw.Technique, name: str, seed: int = 0, host: str = "llama"
) -> tuple[Path, Tensor]:
    """A file, and what its adapter answers."""
    model = tiny(host).eval()
    stir(gw.attach(model, technique, name=name, head=False), seed=seed)
    with torch.no_grad():
        return gw.save(model, folder, name=name), model(**tiny_batch(host)).logits


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**tiny_batch("llama")).logits


@pytest.mark.parametrize(
    "technique",
    [
        gw.LoRA(rank=4),
        gw.LoRA(rank=1, alpha=7),
        gw.LoRA(rank=4, stabilised=True, layers=(1,)),
        gw.LoRA(rank=2, init="pissa"),
        gw.KaSA(rank=2),
    ],
    ids=repr,
)
def test_a_slot_holds_any_smaller_low_rank_change(technique: gw.Technique, tmp_path: Path) -> None:
    path, wanted = stored(tmp_path, technique, "other")
    model = tiny("llama").eval()
    stir(gw.attach(model, gw.LoRA(rank=8, alpha=3), name="slot", head=False), seed=5)
    gw.swap(model, "slot", path)
    torch.testing.assert_close(answer(model), wanted, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "technique", [gw.IA3(), gw.PrefixTuning(length=3, hidden=None), gw.BottleneckAdapter(width=4)], ids=repr
)
def test_the_same_technique_takes_its_like(technique: gw.Technique, tmp_path: Path) -> None:
    path, wanted = stored(tmp_path, technique, "other")
    model = tiny("llama").eval()
    stir(gw.attach(model, technique, name="slot", head=False), seed=5)
    gw.swap(model, "slot", path)
    torch.testing.assert_close(answer(model), wanted, atol=2e-6, rtol=1e-4)


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    model = tiny("llama").eval()
    stir(gw.attach(model, gw.LoRA(rank=2), name="slot", head=False))
    before = answer(model)
    for technique, words in (
        (gw.LoRA(rank=4), "rank 4, the slot 2"),
        (gw.LoRA(rank=2, workspaces=("feedforward.up",)), "no module"),
        (gw.LoHa(rank=1), "not a product of two factors"),
        (gw.IA3(), "not a product"),
    ):
        path, _ = stored(tmp_path, technique, "other")
        with pytest.raises(BadFile, match=words):
            gw.swap(model, "slot", path)
        assert torch.equal(answer(model), before)
    path, _ = stored(tmp_path, gw.LoRA(rank=2), "foreign", host="bert")
    with pytest.raises(WrongBase):
        gw.swap(model, "slot", path)
    gw.attach(model, gw.IA3(), name="vector", head=False)
    gw.attach(model, gw.PrefixTuning(length=3), name="scaffolded", head=False)
    path, _ = stored(tmp_path, gw.PrefixTuning(length=3), "other")
    with pytest.raises(BadFile, match="hidden=None"):
        gw.swap(model, "scaffolded", path)
    path, _ = stored(tmp_path, gw.LoRA(rank=2), "other")
    with pytest.raises(BadFile, match="Detach it and load the other"):
        gw.swap(model, "vector", path)


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    torch.compiler.reset()
    model, counter = tiny("llama").eval(), CompileCounterWithBackend("aot_eager")
    gw.attach(model, gw.LoRA(rank=4), name="slot", head=False)
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(**tiny_batch("llama"))
        frames = counter.frame_count
        for rank in (1, 4):
            path, wanted = stored(tmp_path, gw.LoRA(rank=rank, alpha=rank + 1), "other", seed=rank)
            gw.swap(model, "slot", path)
            torch.testing.assert_close(compiled(**tiny_batch("llama")).logits, wanted, atol=2e-6, rtol=1e-4)
    assert counter.frame_count == frames


def test_a_forward_sees_one_adapter_or_the_other(tmp_path: Path) -> None:
    """Another thread swaps all the time; every answer is one of the two, never a mixture."""
    first, a = stored(tmp_path, gw.LoRA(rank=4), "first", seed=1)
    second, b = stored(tmp_path, gw.LoRA(rank=4), "second", seed=2)
    model, stop = tiny("llama").eval(), threading.Event()
    gw.load(model, first, name="slot")

    def swapping() -> None:
        while not stop.is_set():
            for path in (second, first):
                gw.swap(model, "slot", path)

    thread = threading.Thread(target=swapping)
    thread.start()
    try:
        found = [answer(model) for _ in range(60)]
    finally:
        stop.set()
        thread.join()
    assert all(any(torch.allclose(each, one, atol=2e-6, rtol=1e-4) for one in (a, b)) for each in found)
