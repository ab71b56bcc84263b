"""Arithmetic and merging of adapters: new ones out of trained ones, without training."""

from graftwork.composition.methods import (
    DARE,
    METHODS,
    TIES,
    Concatenation,
    Linear,
    MagnitudePruning,
    Method,
    make_method,
)
from graftwork.composition.parameters import Parameters
from graftwork.composition.search import Search, golden, grid, scored
from graftwork.composition.verbs import Composed

__all__ = [
    "DARE",
    "METHODS",
    "TIES",
    "Composed",
    "Concatenation",
    "Linear",
    "MagnitudePruning",
    "Method",
    "Parameters",
    "Search",
    "golden",
    "grid",
    "make_method",
    "scored",
]
