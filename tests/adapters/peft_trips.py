"""Adapters on their way between the libraries: what each agreement test asks of its own cases."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import peft
import pytest
from peft_hosts import gap, generated, host, loaded_by_peft, logits, made_by_peft, randomised

from graftwork.adapters.store import load, save
from graftwork.engine.attach import attach
from graftwork.errors import BadFile
from graftwork.reference.technique import Technique
from pages import ROOT, rows

CLOSE = 1e-5
DECODES = ("llama", "qwen3", "smollm3", "gpt-neox", "gpt2", "opt", "t5", "t5-four", "t5-short", "bart")


def read_here_and_written_again(name: str, config: peft.PeftConfig, folder: Path) -> None:
    """peft makes an adapter; ours answers alike, and so does what is written of ours, in peft again."""
    made_by_peft(name, config, folder / "theirs")
    theirs = loaded_by_peft(name, folder / "theirs")  # peft trains AdaLoRA's ranknum, but does not save it
    wanted = logits(theirs, name)
    assert gap(logits(host(name), name), wanted) > 0.01, "the adapter must matter for this to test anything"
    model = host(name)
    load(model, folder / "theirs", name="fr")
    assert gap(wanted, logits(model, name)) < CLOSE
    if name in DECODES:
        assert gap(generated(theirs, name), generated(model, name)) < CLOSE
    written = save(model, folder / "ours", name="fr", format="hf-peft")
    assert gap(wanted, logits(loaded_by_peft(name, written), name)) < CLOSE


def read_by_peft_and_here(name: str, techniques: tuple[Technique, ...], folder: Path) -> None:
    """An adapter of ours is written; peft answers alike, and so does what is read of the file here."""
    model = host(name)
    attach(model, techniques, name="fr")
    wanted = logits(randomised(model), name)
    assert gap(logits(host(name), name), wanted) > 0.01, "the adapter must matter for this to test anything"
    written = save(model, folder, name="fr", format="hf-peft")
    theirs = loaded_by_peft(name, written)
    assert gap(wanted, logits(theirs, name)) < CLOSE
    if name in DECODES:
        assert gap(generated(theirs, name), generated(model, name)) < CLOSE
    again = host(name)
    load(again, written)
    assert gap(wanted, logits(again, name)) < CLOSE


def refused_to_write(name: str, techniques: tuple[Technique, ...], text: str, folder: Path) -> None:
    """The format has no place for the adapter."""
    model = host(name)
    attach(model, techniques, name="fr")
    with pytest.raises(BadFile, match=text):
        save(model, folder, name="fr", format="hf-peft")


def options_on_the_page(kinds: dict[str, ModuleType]) -> None:
    """docs/hf-peft.md names, in the row of each type, the options that its module understands."""
    row_of = {row[0].split("(")[0].strip(): " ".join(row) for row in rows(ROOT / "docs" / "hf-peft.md")}
    for kind, module in kinds.items():
        assert all(f"`{name}`" in row_of[kind] for name in module.UNDERSTOOD if name != "modules_to_save")
