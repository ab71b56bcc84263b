"""Sequence port: extra positions, put in before a stack of layers and taken out behind it."""

from __future__ import annotations
