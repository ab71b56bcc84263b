"""`name=value` arguments."""

from __future__ import annotations

from collections.abc import Iterable

from graftwork.errors import BadOption


def pairs(assignments: Iterable[str]) -> dict[str, str]:
    """`["text=sentence"]` as a mapping; raises BadOption on anything else."""
    found = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not (name and equals and value):
            raise BadOption(f"{assignment!r} is not of the form NAME=VALUE")
        found[name] = value
    return found
