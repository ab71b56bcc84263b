"""The frame of studies: cells that survive an interruption, statistics, pages, the command."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from made_up import made_up
from typer.testing import CliRunner

from graftwork.cli.main import app, main
from graftwork.errors import BadData, BadOption, UnknownName
from graftwork.studies import registry
from graftwork.studies.cells import Cell, Cells, Measured
from graftwork.studies.findings import Findings, mean_curve
from graftwork.studies.page import write
from graftwork.studies.session import Session
from graftwork.studies.spread import Spread, difference, spread
from graftwork.studies.study import Settings, Study, data_folder


def run(study: Study, file: Path, **settings: object) -> tuple[Findings, Session]:
    session = Session(Settings(**settings), Cells(file))  # type: ignore[arg-type]
    return study.run(session), session


def test_an_interrupted_study_measures_only_what_is_missing(tmp_path: Path) -> None:
    measured: list[tuple[str, int]] = []

    def stop_at_the_fourth(arm: str, seed: int) -> None:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((arm, seed))

    file = tmp_path / "cells.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(made_up(stop_at_the_fourth), file)
    assert measured == [("oak", 0), ("oak", 1), ("oak", 2)]
    again: list[tuple[str, int]] = []
    found, session = run(made_up(lambda arm, seed: again.append((arm, seed))), file)
    assert again == [("birch", 0), ("birch", 1), ("birch", 2)]
    assert list(found.tables[0].rows) == [["oak", "21.0 ± 1.0"], ["birch", "11.0 ± 1.0"]]
    assert len(session.used) == 6


def test_a_line_cut_short_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    run(made_up(), file)
    file.write_text(file.read_text()[:-9])
    again: list[tuple[str, int]] = []
    run(made_up(lambda arm, seed: again.append((arm, seed))), file)
    assert again == [("birch", 2)]
    assert len(file.read_text().splitlines()) == 6


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    run(made_up(), file)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], '{"arm": "oak"}', *lines[2:], ""]))
    with pytest.raises(BadData, match="line 2 is no cell"):
        Cells(file)


@pytest.mark.parametrize("change", [{"size": "full"}, {"seeds": (0, 1, 2, 3)}], ids=str)
def test_other_choices_are_measured_anew(tmp_path: Path, change: dict[str, object]) -> None:
    file, again = tmp_path / "cells.jsonl", []
    run(made_up(), file)
    _, session = run(made_up(lambda arm, seed: again.append(seed)), file, **change)
    assert set(again) == ({3} if "seeds" in change else {0, 1, 2})
    assert len(session.used) == (8 if "seeds" in change else 6)


def test_a_run_that_diverged_is_kept_and_shown(tmp_path: Path) -> None:
    file = tmp_path / "cells.jsonl"
    for _ in range(2):
        session = Session(Settings(), Cells(file))
        found = session.cell("sgd", "hill", 0, lambda: Measured({"loss": math.inf}), rate=1.0)
        assert math.isnan(found.figures["loss"]) or math.isinf(found.figures["loss"])
    assert json.loads(file.read_text())["figures"] == {"loss": None}
    assert spread([1.0, math.nan, 2.0]).text() == "1 of 3 diverged"


def test_choices_must_be_plain(tmp_path: Path) -> None:
    session = Session(Settings(), Cells(tmp_path / "cells.jsonl"))
    with pytest.raises(BadOption, match="must be plain values"):
        session.cell("a", "b", 0, lambda: Measured({}), rate=torch.ones(1))  # type: ignore[arg-type]


def test_each_cell_starts_from_its_seed(tmp_path: Path) -> None:
    def draw() -> Measured:
        return Measured({"drawn": float(torch.rand(()))})

    session = Session(Settings(), Cells(tmp_path / "cells.jsonl"))
    drawn = [session.cell(arm, "t", seed, draw).figures["drawn"] for arm in "ab" for seed in (0, 1)]
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]


def test_spread_is_mean_and_sample_deviation() -> None:
    assert spread([1.0, 2.0, 4.0]) == Spread(pytest.approx(7 / 3), pytest.approx(math.sqrt(7 / 3)), 3)
    assert spread([0.5]).text() == "0.500"
    assert spread([0.80, 0.84]).text(1, 100) == "82.0 ± 2.8"
    with pytest.raises(ValueError):
        spread([])


@pytest.mark.parametrize(
    ("differences", "sign"),
    [((2.0, 2.1, 1.9), 1), ((-2.0, -2.1, -1.9), -1), ((2.0, -1.0, 1.0), 0), ((2.0,), 0)],
)
def test_arms_are_told_apart_by_paired_seeds(
    tmp_path: Path, differences: tuple[float, ...], sign: int
) -> None:
    """Pairs cancel what a seed does to both: 10, 20, 30 here. Agrees with scipy's paired t-test at 5 %."""
    from scipy.stats import ttest_rel

    session = Session(Settings(), Cells(tmp_path / "cells.jsonl"))

    def cells(arm: str, values: list[float]) -> list[Cell]:
        return [session.cell(arm, "t", n, partial(Measured, {"y": value})) for n, value in enumerate(values)]

    second = cells("b", [10.0 * n for n in range(len(differences))])
    first = cells("a", [10.0 * n + less for n, less in enumerate(differences)])
    found = difference(first, second, "y")
    assert found.sign == sign
    if len(differences) > 1:
        p = ttest_rel([c.figures["y"] for c in first], [c.figures["y"] for c in second]).pvalue
        assert found.clear == (p < 0.05)
    with pytest.raises(ValueError, match="cannot be paired"):
        difference(first, second[:-1], "y")


def test_mean_curves_keep_the_points_that_all_have(tmp_path: Path) -> None:
    session = Session(Settings(), Cells(tmp_path / "cells.jsonl"))
    cells = [
        session.cell("a", "t", n, lambda n=n: Measured({}, {"y": [(x, x * n) for x in range(2 + n)]}))
        for n in (0, 1)
    ]
    curve = mean_curve("a", cells, "y")
    assert list(curve.points) == [(0, 0.0), (1, 0.5)]
    assert curve.deviation == [0.0, pytest.approx(math.sqrt(0.5))]


def test_the_page_says_what_how_and_where(tmp_path: Path) -> None:
    study = made_up()
    found, session = run(study, tmp_path / "cells.jsonl")
    page = write(study, session, found, tmp_path / "docs").read_text()
    for text in (
        "# Trees",
        "**Claim.** Oaks are higher.",
        "**Verdict.** It appeared.",
        "graftwork study made-up --seeds 0,1,2 --write docs/studies",
        "Seeds 0, 1, 2. Measured on",
        f"torch {torch.__version__}",
        "| oak | 21.0 ± 1.0 |",
        "![Growth](made-up.png)",
    ):
        assert text in page, text
    assert (tmp_path / "docs" / "made-up.png").read_bytes().startswith(b"\x89PNG")
    assert len(Cells(tmp_path / "docs" / "made-up.jsonl").file.read_text().splitlines()) == 6


def test_the_same_cells_make_the_same_page(tmp_path: Path) -> None:
    study = made_up()
    for folder in ("one", "two"):
        found, session = run(study, tmp_path / "cells.jsonl")
        write(study, session, found, tmp_path / folder)
    for name in ("made-up.md", "made-up.jsonl", "made-up.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"seeds": ()}, "at least one"),
        ({"seeds": (0, 0)}, "each once"),
        ({"seeds": (-1,)}, "below 0"),
        ({"size": "huge"}, "small, full"),
    ],
)
def test_bad_settings(settings: dict[str, object], word: str) -> None:
    with pytest.raises(BadOption, match=word):
        Settings(**settings)  # type: ignore[arg-type]


def test_where_data_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRAFTWORK_DATA", raising=False)
    assert data_folder() is None
    (tmp_path / "set").mkdir()
    assert Session(Settings(data=tmp_path), Cells(tmp_path / "c")).data("set") == tmp_path / "set"
    assert Session(Settings(data=tmp_path), Cells(tmp_path / "c")).data("other") is None
    assert Session(Settings(), Cells(tmp_path / "c")).data("set") is None
    monkeypatch.setenv("GRAFTWORK_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    with pytest.raises(BadData, match="is no folder"):
        data_folder(tmp_path / "nothing")


def test_an_unknown_study_is_answered_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "names", lambda: ["made-up", "other"])
    with pytest.raises(UnknownName, match="Did you mean made-up"):
        registry.study("made-op")


def test_the_command_measures_resumes_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr(registry, "names", lambda: ["made-up"])
    monkeypatch.setattr(registry, "study", lambda name: made_up(lambda arm, seed: measured.append(seed)))
    words = ["study", "made-up", "--seeds", "0,1", "--store", str(tmp_path / "store")]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.output
    assert "Oaks are higher" in first.output
    second = CliRunner().invoke(app, [*words, "--write", str(tmp_path / "docs")])
    assert second.exit_code == 0, second.output
    assert len(measured) == 4
    assert (tmp_path / "docs" / "made-up.md").is_file()
    assert CliRunner().invoke(app, [*words, "--fresh"]).exit_code == 0
    assert len(measured) == 8
    listed = CliRunner().invoke(app, ["study"])
    assert "made-up" in listed.output
    assert "Nobody 2020" in listed.output


@pytest.mark.parametrize(
    "words", [["no-such-study"], ["made-up", "--seeds", "a"], ["made-up", "--size", "big"]]
)
def test_the_command_says_what_is_wrong(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = registry.study
    monkeypatch.setattr(registry, "study", lambda name: made_up() if name == "made-up" else real(name))
    with pytest.raises(SystemExit) as left:
        main(["study", *words])
    assert left.value.code == 2
    assert "Error:" in capsys.readouterr().err


@pytest.mark.parametrize("name", registry.names())
def test_each_study_is_complete(name: str) -> None:
    found = registry.study(name)
    assert found.name == name
    assert all((found.title, found.source, found.claim))


def test_pages_and_studies_belong_together() -> None:
    folder = Path(__file__).parents[2] / "docs" / "studies"
    pages = {page.stem for page in folder.glob("*.md")} - {"README"}
    assert pages <= set(registry.names())
    listed = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"| [{name}]({name}.md) |" in listed for name in pages)
    assert all(f"`{name}`" in listed for name in set(registry.names()) - pages), (
        "say that it is not measured yet"
    )
