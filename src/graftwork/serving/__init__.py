"""Many adapters on one base."""

from graftwork.serving.shelf import Shelf

__all__ = ["Shelf"]
