"""A user's way through the verbs on a tiny host: tune, evaluate, merge, convert."""

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import recipe_values

from graftwork.adapters.store import load
from graftwork.cli import main as entry
from graftwork.models.base import load_base
from graftwork.training.recipe import Recipe


def graftwork(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        entry.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return int(left.value.code or 0), printed.out, printed.err


@pytest.mark.slow
def test_from_recipe_to_merged_model(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {**recipe_values(stage, tmp_path / "run", steps=4), "technique": "lora"}
    (tmp_path / "r.yaml").write_text(Recipe.of(values).text())
    code, out, err = graftwork(capsys, "tune", tmp_path / "r.yaml", "technique.rank=3")
    assert code == 0, err
    assert "accuracy" in out
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["techniques"][0] == "LoRA(rank=3)"

    code, out, err = graftwork(capsys, "tune", tmp_path / "r.yaml", "technique.rank=3")
    assert code == 2
    assert "--overwrite" in err
    code, out, err = graftwork(capsys, "tune", tmp_path / "r.yaml", "technique.rank=3", "--resume")
    assert code == 0, err

    code, out, err = graftwork(capsys, "evaluate", tmp_path / "run", "--split", "validation")
    assert code == 0, err
    assert f"{facts['scores']['validation']['accuracy']:.4f}" in out

    code, out, err = graftwork(capsys, "merge", tmp_path / "run", tmp_path / "merged")
    assert code == 0, err
    host, tokenizer = load_base(str(stage / "host"), task="text-classification", labels=["even", "odd"])
    load(host, tmp_path / "run" / "adapter")
    merged, _ = load_base(str(tmp_path / "merged"), task="text-classification", labels=["even", "odd"])
    inputs = tokenizer(["w1 w2 w3", "w4"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(**inputs).logits, host.eval()(**inputs).logits)
    code, _, err = graftwork(capsys, "merge", tmp_path / "run", tmp_path / "merged")
    assert code == 2
    assert "not empty" in err

    written = []
    for source, target in (("run/adapter", "one"), ("run", "other")):
        code, out, err = graftwork(capsys, "convert", tmp_path / source, tmp_path / target)
        assert code == 0, err
        written.append({file.name: file.read_bytes() for file in (tmp_path / target).iterdir()})
    assert "adapter_config.json" in written[0]
    assert written[0] == written[1]
