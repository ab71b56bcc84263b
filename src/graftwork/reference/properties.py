"""The nine properties of PEFT-Ref (Sabry and Belz 2023, arXiv:2304.12410) as enumerations.

Number of insertions and workspace, the two open-ended ones, are a field each of `Card`.
"""

from __future__ import annotations

from enum import StrEnum


class IntraConnectivity(StrEnum):
    """How the units inside one module are wired, and as what kind of network."""

    NONE = "none"
    EMBEDDING = "dense: embedding"
    LINEAR = "dense: linear"
    NONLINEAR = "dense: non-linear MLP"
    SELF_ATTENTION = "dense: self-attention"
    HYPERCOMPLEX = "dense: hypercomplex MLP"
    SPARSE = "sparse"


class InterConnectivity(StrEnum):
    """How modules are wired to the host and to one another."""

    FIXED_DENSE = "fixed-dense"
    FIXED_SPARSE = "fixed-sparse"
    DYNAMIC = "dynamic"


class Adaptation(StrEnum):
    """New weights, or an update of host weights expressed anew."""

    ADDITION = "addition"
    REPARAMETERISATION = "reparameterisation"


class Sharing(StrEnum):
    """Whether trainable weights are common to several modules."""

    NONE = "none"
    SHARED = "shared"
    TIED = "tied"


class Input(StrEnum):
    """What the module consumes."""

    DATA = "data"
    HIDDEN = "hidden"
    WEIGHTS = "weights"


class Insertion(StrEnum):
    """On the same path behind a host part, or on a bypass that reads what the host part reads."""

    SEQUENTIAL = "sequential"
    PARALLEL = "parallel"


class Insertions(StrEnum):
    """In how many places of the host one adapter lives."""

    ONE = "1"
    CHOSEN_LAYERS = "chosen layers"
    ALL_LAYERS = "all layers"


class Integration(StrEnum):
    """The operator that joins the module's output z and the host's signal y."""

    CONCATENATION = "concatenation"
    DIRECT_ADDITION = "direct addition"
    SCALED_ADDITION = "scaled addition"
    GATED_ADDITION = "gated addition"
    RESCALING = "rescaling"


class Port(StrEnum):
    """The four ways into a host; a card's properties decide which one its modules use."""

    WEIGHT = "weight"
    HIDDEN = "hidden"
    ATTENTION = "attention"
    SEQUENCE = "sequence"
