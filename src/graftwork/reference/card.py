"""A technique's PEFT-Ref properties as data. The engine reads them; nothing else decides how it runs."""

from __future__ import annotations

from dataclasses import dataclass

from graftwork.errors import CardConflict
from graftwork.reference.properties import (
    Adaptation,
    Input,
    Insertion,
    Insertions,
    Integration,
    InterConnectivity,
    IntraConnectivity,
    Port,
    Sharing,
)


@dataclass(frozen=True, kw_only=True)
class Card:
    """The nine properties, three facts the engine relies on (tested, never believed), and the documentation.

    Attributes:
        workspaces: where the technique goes unless told otherwise; a `|` offers alternatives, first match
            wins (`attention.query|attention.qkv`), a `?` at the end makes an entry optional.
        linear: merging is possible: the adapter amounts to a change of weights.
        identity_at_init: attaching changes no output.
        token_wise: the module treats positions one by one, so it can be routed per token.
        scale: the constant s of scaled addition; 1 elsewhere.
        formula, parameters, defaults, citation: one line each, shown by `graftwork techniques NAME`.
    """

    intra_connectivity: IntraConnectivity
    inter_connectivity: InterConnectivity = InterConnectivity.FIXED_DENSE
    adaptation: Adaptation
    sharing: Sharing = Sharing.NONE
    input: Input
    insertion: Insertion
    insertions: Insertions = Insertions.ALL_LAYERS
    integration: Integration
    workspaces: tuple[str, ...]
    linear: bool
    identity_at_init: bool
    token_wise: bool = True
    scale: float = 1.0
    formula: str
    parameters: str
    citation: str

    @property
    def port(self) -> Port:
        """The way into the host that follows from adaptation, input and integration."""
        if self.adaptation is Adaptation.REPARAMETERISATION:
            return Port.WEIGHT
        if self.input is Input.HIDDEN:
            if self.integration is Integration.CONCATENATION:
                raise CardConflict("a module that reads hidden states cannot be joined by concatenation")
            return Port.HIDDEN
        if self.input is Input.DATA and self.integration is Integration.CONCATENATION:
            return Port.SEQUENCE
        if self.input is Input.DATA and self.integration is Integration.GATED_ADDITION:
            return Port.ATTENTION
        raise CardConflict(
            f"no port takes input={self.input.value}, adaptation={self.adaptation.value}, "
            f"integration={self.integration.value}: data enters by concatenation (sequence port) "
            "or gated addition (keys and values at the attention port)"
        )
