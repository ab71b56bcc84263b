"""The table of pains and the tests of pains name each other."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEXT_IN_LINE = 12


def rows() -> list[tuple[str, list[str]]]:
    """(number or `next`, test names) of each row."""
    lines = (ROOT / "docs" / "pains.md").read_text().splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if re.match(r"\| (\d+|next) ", line)
    ]
    assert all(len(row) == 4 and all(row) for row in cells)
    return [(row[0], re.findall(r"`(test_pain_[a-z0-9_]+\*?)`", row[3])) for row in cells]


@cache
def known() -> frozenset[str]:
    """Every test of a pain."""
    trees = [ast.parse(path.read_text()) for path in Path(__file__).parent.glob("test_*.py")]
    names = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return frozenset(name for name in names if name.startswith("test_pain_"))


def named(name: str) -> set[str]:
    return {test for test in known() if (test.startswith(name[:-1]) if name.endswith("*") else test == name)}


def test_every_pain_has_a_row() -> None:
    numbers = [number for number, _ in rows()]
    assert numbers == [*map(str, range(1, 26)), *["next"] * NEXT_IN_LINE]


def test_every_row_names_tests_of_its_number() -> None:
    for number, names in rows():
        prefix = "test_pain_next_" if number == "next" else f"test_pain_{int(number):02}_"
        assert names, f"row {number} names no test"
        for name in names:
            assert name.startswith(prefix), f"row {number}: {name}"
            assert named(name), f"row {number}: there is no {name}"


def test_every_test_has_its_row() -> None:
    assert known() == {test for _, names in rows() for name in names for test in named(name)}
