"""Tables of model families, one file per kin; a file lists its tables in `ANATOMIES`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping

from graftwork.anatomy.anatomy import Anatomy


@functools.cache
def families() -> Mapping[str, Anatomy]:
    """`config.model_type` -> table, of every family known."""
    found: dict[str, Anatomy] = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for anatomy in module.ANATOMIES:
            found.update(dict.fromkeys(anatomy.families, anatomy))
    return found
