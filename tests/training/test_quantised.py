"""Runs on a base that bitsandbytes quantises."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import recipe_values

import graftwork as gw
from graftwork.errors import BadOption, BadRecipe, NotMergeable
from graftwork.models.base import load_base
from graftwork.testing import tiny

ABSENT = importlib.util.find_spec("bitsandbytes") is None
needs_it = pytest.mark.skipif(ABSENT, reason="bitsandbytes is not installed (graftwork[quantised])")


@pytest.fixture(scope="module")
def wide(stage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage with a host as wide as a 4-bit block: bitsandbytes' CPU kernel takes no narrower rows."""
    folder = tmp_path_factory.mktemp("wide") / "stage"
    shutil.copytree(stage, folder)
    tiny("bert-base", {"hidden_size": 64, "intermediate_size": 128}).save_pretrained(folder / "host")
    return folder


def test_without_bitsandbytes_the_error_says_what_to_install(stage: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadOption, match=r"pip install 'graftwork\[quantised\]'"):
        load_base(str(stage / "host"), quantised="nf4")


def test_another_word_is_refused(stage: Path) -> None:
    with pytest.raises(BadOption, match="'int3' is not one of 'nf4', 'int8'"):
        load_base(str(stage / "host"), quantised="int3")


@needs_it
@pytest.mark.parametrize(("kind", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_linear_layers_are_quantised_and_the_head_is_not(wide: Path, kind: str, layer: str) -> None:
    task = {"task": "text-classification", "labels": 2}
    model, _ = load_base(str(wide / "host"), **task, quantised=kind)
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    assert kinds["bert.encoder.layer.0.attention.self.query"] == layer
    assert kinds["classifier"] == "Linear"
    ids = torch.arange(5, 25).view(2, 10)
    plain, _ = load_base(str(wide / "host"), **task)
    plain.classifier.load_state_dict(model.classifier.state_dict())
    with torch.no_grad():
        gap = (model.eval()(ids).logits - plain.eval()(ids).logits).norm() / plain(ids).logits.norm()
    assert 0 < gap < 0.5


@needs_it
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_trains_and_scores_again(wide: Path, tmp_path: Path, kind: str) -> None:
    values = recipe_values(wide, tmp_path / "run", steps=4)
    values["model"] = {"name": str(wide / "host"), "quantised": kind}
    result = gw.tune(gw.Recipe.of(values))
    again = gw.evaluate(tmp_path / "run", split="validation")
    assert again["loss"] == pytest.approx(result.scores["validation"]["loss"], abs=1e-3)
    host, _ = load_base(
        str(wide / "host"), task="text-classification", labels=["even", "odd"], quantised=kind
    )
    gw.load(host, tmp_path / "run")
    with pytest.raises(NotMergeable, match="stored quantised"):
        gw.merge(host)


def test_a_start_from_what_quantisation_lost_needs_a_quantised_base(wide: Path, tmp_path: Path) -> None:
    values = recipe_values(wide, tmp_path / "run", steps=2)
    values["technique"] = {"name": "lora", "rank": 4, "init": "loftq"}
    with pytest.raises(BadRecipe, match=r"set model\.quantised"):
        gw.tune(gw.Recipe.of(values))


@needs_it
@pytest.mark.slow
def test_a_run_starts_from_what_quantisation_lost(wide: Path, tmp_path: Path) -> None:
    values = recipe_values(wide, tmp_path / "run", steps=2)
    values["model"] = {"name": str(wide / "host"), "quantised": "nf4"}
    values["technique"] = {"name": "lora", "rank": 4, "init": "loftq"}
    values["training"]["learning_rate"] = 1e-12  # so what is saved is the start
    gw.tune(gw.Recipe.of(values))
    task = {"task": "text-classification", "labels": ["even", "odd"]}
    full, _ = load_base(str(wide / "host"), **task)
    host, _ = load_base(str(wide / "host"), **task, quantised="nf4")
    wanted = gw.attach(host, gw.LoRA(rank=4, init="loftq"), originals=full, head=False)
    found = gw.load(load_base(str(wide / "host"), **task, quantised="nf4")[0], tmp_path / "run")
    for (name, one), (_, other) in zip(wanted.tensors().items(), found.tensors().items(), strict=False):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5, msg=name)
