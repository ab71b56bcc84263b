"""docs/objectives.md lists every objective and option, with its default."""

from __future__ import annotations

from dataclasses import MISSING, fields

import pytest

from graftwork.objectives import (
    Consistency,
    Diversity,
    LoadBalance,
    Objective,
    Orthogonality,
    SingularValues,
    SpectralConcentration,
    objectives,
)
from pages import ROOT, rows

OWN = (Consistency, Diversity, LoadBalance, Orthogonality, SingularValues, SpectralConcentration)


def listed() -> dict[tuple[str, str], str]:
    table = [row for row in rows(ROOT / "docs" / "objectives.md") if len(row) == 4]
    return {(row[0].strip("`"), row[1].strip("`")): row[2].strip("`") for row in table}


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.name)
def test_options_are_listed_with_their_defaults(kind: type[Objective]) -> None:
    common = {field.name for field in fields(Objective)}
    for option in fields(kind):
        owner = "every one" if option.name in common else kind.name
        default = "required" if option.default is MISSING else str(option.default)
        assert listed()[owner, option.name] == default


def test_nothing_else_is_listed() -> None:
    names = {owner for owner, _ in listed()} - {"objective", "---", "every one"}
    common = len(fields(Objective))
    assert names == {kind.name for kind in OWN if len(fields(kind)) > common}
    assert names <= set(objectives())


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.name)
def test_every_one_is_named(kind: type[Objective]) -> None:
    assert f"`{kind.name}`" in (ROOT / "docs" / "objectives.md").read_text()
