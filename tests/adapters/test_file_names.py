"""Names of adapter files stay in their folder."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwork.adapters.names import as_adapter_name, check_file_name
from graftwork.errors import BadOption


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/x",
        "a/b",
        "a\\b",
        "x\0y",
        "",
        " ",
        ".hidden",
        "..",
        "a\nb",
        "x" * 200,
        "C:x",
        " a",
        "a\u202e",
    ],
)
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(BadOption, match="adapter name"):
        check_file_name(name)


@given(st.text(max_size=150))
def test_any_folder_name_becomes_a_valid_adapter_name(text: str) -> None:
    name = as_adapter_name(text)
    assert "." not in name
    assert check_file_name(name) == name
