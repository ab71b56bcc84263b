"""Attention port: extra keys and values, through transformers' attention interface."""

from __future__ import annotations

from typing import Any


def members(base: type) -> dict[str, Any]:
    """Class members of an attention module's swapped class; empty for any other."""
    return {}
