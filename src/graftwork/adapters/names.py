"""What an adapter file may be called. Pure functions."""

from __future__ import annotations

import re

from graftwork.errors import BadOption

LONGEST = 120


def check_file_name(name: str) -> str:
    """`name`, if it can be an adapter's file name; BadOption where it could leave the folder or hide."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name) or len(name) > LONGEST:
        raise BadOption(
            f"adapter name {name[:200]!r} cannot be a file name; use letters, digits, '_' and '-', "
            f"at most {LONGEST} in all"
        )
    return name


def as_adapter_name(text: str) -> str:
    """A valid adapter name close to `text` (a folder's name): other characters become '-'."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_")[:LONGEST] or "adapter"
