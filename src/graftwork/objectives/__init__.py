"""Extra loss terms for any technique: `Objectives(model, [Consistency(weight=0.15), ...])`."""

from graftwork.objectives.base import Context, Objective
from graftwork.objectives.consistency import Consistency
from graftwork.objectives.diversity import Diversity
from graftwork.objectives.load_balance import LoadBalance
from graftwork.objectives.orthogonality import Orthogonality
from graftwork.objectives.registry import make_objective, objectives
from graftwork.objectives.singular_values import SingularValues
from graftwork.objectives.spectral_concentration import SpectralConcentration
from graftwork.objectives.total import Objectives, Total

__all__ = [
    "Consistency",
    "Context",
    "Diversity",
    "LoadBalance",
    "Objective",
    "Objectives",
    "Orthogonality",
    "SingularValues",
    "SpectralConcentration",
    "Total",
    "make_objective",
    "objectives",
]
