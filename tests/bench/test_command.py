"""The command, its JSON and the page it renews."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_hosts import LLAMA

from graftwork.bench import page
from graftwork.bench.hosts import HOSTS
from graftwork.bench.table import Goal, Table, goal_rows, shown
from graftwork.cli import main as entry
from graftwork.errors import BadData


def graftwork(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        entry.main(["bench", *arguments])
    return int(left.value.code or 0)


@pytest.mark.slow
def test_tables_json_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(HOSTS, "llama", LLAMA)
    out, report = tmp_path / "out.json", tmp_path / "page.md"
    first, last = page.marks("cpu")
    report.write_text(f"before\n{first}\nold\n{last}\nafter\n")
    options = [
        "--model",
        "llama",
        "--dtype",
        "bf16",
        "--rounds",
        "1",
        "--json",
        str(out),
        "--write",
        str(report),
    ]
    assert graftwork("merge", *options) == 0
    assert "graftwork" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["machine"]["torch"]
    assert result["settings"] == {"hosts": ["tiny-llama"], "dtypes": ["bf16"], "device": "cpu", "rounds": 1}
    (table,) = result["tables"]
    assert table["goals"][0]["verdict"] == "reached"
    text = report.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| graftwork |" in text


@pytest.mark.parametrize(
    "arguments",
    [["stepp"], ["step", "--model", "lama"], ["step", "--dtype", "fp16"], ["step", "--device", "gpu"]],
)
def test_unknown_names_are_refused_before_anything_is_measured(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert graftwork(*arguments) == 2
    assert arguments[-1] in capsys.readouterr().err


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    plain = tmp_path / "page.md"
    plain.write_text("text\n")
    with pytest.raises(BadData, match="bench cpu: begin"):
        page.renew(plain, "cpu", "new")
    assert plain.read_text() == "text\n"


def test_goals_say_reached_missed_or_not_measured() -> None:
    goals = [Goal("a", 1.0, 1.0, "x"), Goal("b", 1.0, 1.001, "x"), Goal("c", 20.0, None, "µs")]
    table = Table("part", "title", ("name",), goals=goals)
    assert [row[-1] for row in goal_rows([table])] == ["reached", "not reached", "not measured"]
    assert goal_rows([table])[2][2:4] == ("", "20 µs")


def test_numbers_are_shown_with_three_digits_or_in_full() -> None:
    assert [shown(v) for v in (0.12345, 12.345, 1234.5, 1234567, None, "x")] == [
        "0.123", "12.3", "1,234", "1,234,567", "", "x",
    ]  # fmt: skip
