"""A shelf of adapters: rows served as one at a time, places taken over, errors that leave everything as it was."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graftwork as gw
from graftwork.errors import BadFile, BadOption, StateError, UnknownName, WrongBase
from graftwork.laws import stir
from graftwork.serving import Shelf
from graftwork.testing import tiny, tiny_batch

SLOT = gw.LoRA(rank=4, workspaces=("attention.query", "attention.value", "feedforward.up"))
MADE = {
    "ann": gw.LoRA(rank=2),
    "bob": gw.LoRA(rank=4, alpha=3, workspaces=("attention.query", "feedforward.up")),
    "cid": gw.LoRA(rank=1, layers=(0,)),
    "eve": gw.LoRA(rank=2, init="pissa"),
    "fay": gw.IA3(),
    "guy": gw.PrefixTuning(length=3),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str | None, Tensor]]:
    """Files of all adapters, and what each answers to the batch alone."""
    folder, answers = tmp_path_factory.mktemp("shelf"), {}
    model, batch = tiny("llama").eval(), tiny_batch("llama")
    with torch.no_grad():
        answers[None] = model(**batch).logits
        for number, (name, technique) in enumerate(MADE.items()):
            stir(gw.attach(model, technique, name=name, head=False), seed=number)
            gw.save(model, folder, name=name)
            answers[name] = model(**batch).logits
            gw.detach(model, name)
    return folder, answers


def shelf_of(folder: Path, model: nn.Module, slot: gw.Technique | None = SLOT, places: int = 3) -> Shelf:
    shelf = Shelf(model, slot, places=places)
    for name in MADE:
        shelf.register(name, folder / f"{name}.safetensors")
    return shelf


@pytest.mark.parametrize("slot", [SLOT, None])
def test_rows_are_served_as_one_at_a_time(made, slot) -> None:
    folder, answers = made
    model, batch = tiny("llama").eval(), tiny_batch("llama")
    shelf = shelf_of(folder, model, slot)
    for rows in (["ann", None, "bob"], ["cid", "eve", "ann"], ["fay", "guy", "bob"], [None] * 3, ["bob"] * 3):
        with torch.no_grad(), shelf.serve(rows):
            found = model(**batch).logits
        wanted = torch.stack([answers[name][row] for row, name in enumerate(rows)])
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, answers[None])
        assert len(shelf.on_model) <= 3
    shelf.close()
    assert type(model) is type(tiny("llama"))


def test_the_longest_unused_gives_its_place(made) -> None:
    folder, _ = made
    shelf = shelf_of(folder, tiny("llama"))
    for name in ("ann", "bob", "cid", "ann", "eve"):
        with shelf.serve([name]):
            pass
    assert shelf.on_model == ("cid", "ann", "eve")


def test_generation_with_another_adapter_per_row_cached_and_left_padded(made) -> None:
    folder, _ = made
    model = tiny("llama").eval()
    shelf = shelf_of(folder, model)
    ids = torch.randint(5, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[2, :1] = 0
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    rows = ["ann", None, "bob"]
    with shelf.serve(rows):
        together = model.generate(ids, attention_mask=mask, **options)
    for row, name in enumerate(rows):
        short = ids[row : row + 1, mask[row].bool()]
        with shelf.serve([name]):
            alone = model.generate(short, attention_mask=torch.ones_like(short), **options)
        assert torch.equal(together[row, 6:], alone[0, -5:])


def test_what_is_in_use_stays(made) -> None:
    folder, _ = made
    shelf = shelf_of(folder, tiny("llama"), places=2)
    with shelf.serve(["ann", "bob"]):
        with pytest.raises(StateError, match="all 2 places"), shelf.serve(["cid"]):
            pass
        with pytest.raises(StateError, match="'ann' is in use"):
            shelf.unregister("ann")
        with pytest.raises(StateError, match="in use"):
            shelf.close()
        with shelf.serve(["bob", "ann"]):
            pass
    with shelf.serve(["cid"]):
        pass
    assert shelf.on_model == ("ann", "cid")
    shelf.unregister("cid")
    assert shelf.on_model == ("ann",)
    with pytest.raises(UnknownName, match="ann"), shelf.serve(["anna"]):
        pass


def test_errors_name_what_is_wrong_and_change_nothing(made, tmp_path: Path) -> None:
    folder, answers = made
    model, batch = tiny("llama").eval(), tiny_batch("llama")
    shelf = shelf_of(folder, model)
    with (
        pytest.raises(StateError, match="4 adapters, the shelf has 3"),
        shelf.serve(["ann", "bob", "cid", "eve"]),
    ):
        pass
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((folder / "ann.safetensors").read_bytes()[:-40])
    other = tiny("bert")
    gw.attach(other, gw.LoRA(rank=2), name="other", head=False)
    foreign = gw.save(other, tmp_path, name="other")
    shelf.register("broken", broken)
    shelf.register("foreign", foreign)
    for name, error in (("broken", BadFile), ("foreign", WrongBase)):
        with pytest.raises(error), shelf.serve(["ann", name, None]):
            pass
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, answers[None])
    broken.write_bytes((folder / "ann.safetensors").read_bytes())
    with torch.no_grad(), shelf.serve(["broken"] * 3):
        torch.testing.assert_close(model(**batch).logits, answers["ann"], atol=2e-6, rtol=1e-4)
    with pytest.raises(StateError, match="registered already"):
        shelf.register("ann", broken)
    with pytest.raises(BadFile, match="does not exist"):
        shelf.register("nobody", tmp_path / "nobody.safetensors")
    with pytest.raises(BadOption, match="at least one place"):
        Shelf(model, SLOT, places=0)


def test_threads_serve_their_own_batches(made) -> None:
    folder, answers = made
    model, batch = tiny("llama").eval(), tiny_batch("llama")
    shelf = shelf_of(folder, model, places=4)
    shelf.prefetch(["ann", "bob", "cid", "eve"])
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(6):
            with torch.no_grad(), shelf.serve([name] * 3):
                if not torch.allclose(model(**batch).logits, answers[name], atol=2e-6, rtol=1e-4):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("ann", "bob", "cid", "eve")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_adapters_stay_active_and_trainable(made) -> None:
    folder, _ = made
    model = tiny("llama")
    mine = gw.attach(model, gw.SSF(), name="mine")
    shelf = shelf_of(folder, model)
    with shelf.serve(["ann", "fay"]):
        pass
    assert mine.trainable
    assert not any(gw.adapters(model)[name].trainable for name in gw.adapters(model) if name != "mine")
    model(**tiny_batch("llama")).logits.mean().backward()
    assert all(parameter.grad is not None for parameter in mine.parameters())
