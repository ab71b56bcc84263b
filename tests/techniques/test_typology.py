"""What is printed and written about techniques."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from graftwork.cli import docs
from graftwork.cli.techniques import rendered, show
from graftwork.errors import BadData, BadOption, UnknownName
from graftwork.reference.technique import Technique
from graftwork.reference.typology import PROPERTIES, compare, describe, options, sheet, table
from graftwork.techniques.bottleneck_adapter import BottleneckAdapter
from graftwork.techniques.lora import LoRA

PAGES = Path(__file__).parents[2] / "docs" / "techniques"


def test_table_has_nine_properties_of_each_technique() -> None:
    rows = table()
    assert rows.keys() >= docs.own().keys()
    assert all(list(row) == list(PROPERTIES) and all(row.values()) for row in rows.values())
    assert len(PROPERTIES) == 9
    assert rows["prefix-tuning"]["integration form"] == "gated addition"
    assert rows["compacter"]["parameter sharing"] == "shared"
    assert rows["ia3"]["workspace"] == "attention, cross_attention, feedforward"


def test_comparison_has_only_what_differs() -> None:
    assert compare("lora", "lora") == {}
    apart = compare("lora", "prefix-tuning")
    assert apart["parameters adapted"] == ("reparameterisation", "addition")
    assert apart["integration form"] == ("scaled addition", "gated addition")
    assert "inter-connectivity" not in apart
    assert all(first != second for first, second in apart.values())


def test_comparison_of_instances_counts_overrides() -> None:
    apart = compare(BottleneckAdapter.pfeiffer(), BottleneckAdapter.parallel())
    assert apart == {
        "insertion form": ("sequential", "parallel"),
        "integration form": ("direct addition", "scaled addition"),
    }


@pytest.mark.parametrize("kind", docs.own().values(), ids=docs.own())
def test_description_is_complete(kind: type[Technique]) -> None:
    text, about = describe(kind.name), sheet(kind)
    for part in (about.formula, about.parameters, about.citation, *about.properties.values()):
        assert part in text
    assert all(option.meaning for option in about.options), "an option has no line under Args"
    assert all(option.name in text and option.default in text for option in about.options)


def test_options_come_with_ranges_and_defaults() -> None:
    found = {option.name: option for option in options(LoRA)}
    assert (found["rank"].default, found["rank"].values) == ("8", "whole number, at least 1")
    assert (found["alpha"].default, found["alpha"].values) == ("none", "number, above 0")
    assert found["dropout"].values == "number, in [0, 1)"
    assert found["insertion"].values == "sequential | parallel"
    assert next(iter(found)) == "rank"
    assert found["rank"].meaning == "inner width of the product."


def test_unknown_technique_comes_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="bottleneck-adapter"):
        describe("bottleneck")
    with pytest.raises(UnknownName, match="Did you mean"):
        compare("lora", "adapter")


@pytest.mark.parametrize("width", ["80", "160"])
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ["prefix-tuning", "gated", "fixed-dense"]),
        (["lora"], ["B A drop(x)", "rank (in + out) per matrix", "2106.09685", "stabilised"]),
        (["lora", "prefix-tuning"], ["reparameterisation", "gated addition"]),
        (["ia3", "ia3"], ["have the same properties"]),
    ],
    ids=["all", "one", "two", "same"],
)
def test_command_prints(names: list[str], expected: list[str], width: str) -> None:
    app = typer.Typer()
    app.command()(show)
    result = CliRunner().invoke(app, names, env={"COLUMNS": width})
    assert result.exit_code == 0
    for part in expected:
        assert part in result.output


def test_command_takes_two_names_at_most() -> None:
    with pytest.raises(BadOption, match="no, one or two names, not 3"):
        rendered(["lora", "ia3", "ssf"])


def test_pages_in_the_repository_are_current(tmp_path: Path) -> None:
    for written in docs.write(tmp_path):
        kept = PAGES / written.name
        assert kept.exists(), "run `make docs`"
        assert kept.read_text(encoding="utf-8") == written.read_text(encoding="utf-8"), "run `make docs`"


def test_readme_table_is_renewed_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{docs.BEGIN}\nold\n{docs.END}\nafter\n")
    docs.docs(tmp_path / "pages", readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{docs.END}\nafter\n")
    assert "old" not in text
    assert "pages/lora.md) |" in text
    assert (tmp_path / "pages" / "lora.md").exists()


def test_readme_with_one_marker_is_refused(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{docs.BEGIN}\n")
    with pytest.raises(BadData, match=r"needs the two lines"):
        docs.renew(readme, tmp_path)
    assert readme.read_text() == f"{docs.BEGIN}\n"
