"""The table of roles on the page is what the techniques declare."""

from __future__ import annotations

import re
from pathlib import Path

import graftwork as gw
from graftwork.cli.docs import own
from graftwork.composition import METHODS

PAGE = (Path(__file__).parents[2] / "docs" / "composition.md").read_text(encoding="utf-8")


def declared() -> dict[str, str]:
    """Technique -> its cell in the table."""
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|$", PAGE, flags=re.MULTILINE)
    return {name: cell for names, cell in rows for name in re.findall(r"`([\w-]+)`", names) if name in own()}


def test_what_the_table_says_is_declared() -> None:
    table = declared()
    assert len(table) > 25
    for name, cell in table.items():
        roles, undefined = gw.techniques()[name].arithmetic.roles, gw.techniques()[name].arithmetic.undefined
        assert ("refused" in cell) == bool(undefined), name
        if "*" not in undefined:
            missing = [
                role.value for role in roles.values() if role.value != "frozen" and role.value not in cell
            ]
            assert not missing, f"{name}: {missing}"


def test_every_method_is_in_the_table() -> None:
    named = {
        cell
        for row in re.findall(r"^\|.*\|$", PAGE, flags=re.MULTILINE)
        for cell in re.findall(r"`([\w-]+)`", row)
    }
    assert set(METHODS) - {"parameters"} <= named
