"""The contract of a technique: a frozen dataclass that is also its own configuration.

A technique file declares its options as annotated fields, its published properties as `published`, and builds
one module per site. Everything else follows from the card.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from enum import Enum, EnumMeta
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from graftwork.errors import BadOption, CardConflict, UnknownName, nearest
from graftwork.reference.arithmetic import Arithmetic
from graftwork.reference.card import Card
from graftwork.reference.properties import Adaptation, Input, Insertion, Integration, Port
from graftwork.reference.site import Site
from graftwork.reference.statistic import Statistic

Layers = str | tuple[int, ...]
_ADDITIVE = {Integration.DIRECT_ADDITION, Integration.SCALED_ADDITION}


@dataclass(frozen=True)
class AtLeast:
    """Annotation: the value is at least `low`."""

    low: float

    def __str__(self) -> str:
        return f"at least {self.low:g}"

    def check(self, value: float) -> str | None:
        return None if value >= self.low else f"must be {self}"


@dataclass(frozen=True)
class Above:
    """Annotation: the value is above `low`."""

    low: float

    def __str__(self) -> str:
        return f"above {self.low:g}"

    def check(self, value: float) -> str | None:
        return None if value > self.low else f"must be {self}"


@dataclass(frozen=True)
class Between:
    """Annotation: the value lies in [low, high), or [low, high] when `closed`."""

    low: float
    high: float
    closed: bool = False

    def __str__(self) -> str:
        return f"in [{self.low:g}, {self.high:g}{']' if self.closed else ')'}"

    def check(self, value: float) -> str | None:
        inside = self.low <= value and (value <= self.high if self.closed else value < self.high)
        return None if inside else f"must lie {self}"


@dataclass(frozen=True)
class Because:
    """Annotation: why the values that a reader may look for are not among the choices."""

    reason: str

    def __str__(self) -> str:
        return self.reason

    def check(self, value: object) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Technique:
    """A kind of PEFT together with its options.

    Args:
        workspaces: where to go instead of the card's default (names, `attention.*`, presets, `re:PATTERN`).
        layers: "all", numbers `(0, 1)`, a range "2-5", "last 4", "first 2" or "every 2".
        insertion, integration: replace the card's value where the port allows it. `integration="gated
            addition"` multiplies what is added by a trained gate that reads each row of the signal.
    """

    published: ClassVar[Card]
    arithmetic: ClassVar[Arithmetic] = Arithmetic()  # how adapters of it add up; means only unless declared
    name: ClassVar[str] = "technique"
    example: ClassVar[str] = ""  # options that must be given, as a page about the technique spells them

    workspaces: tuple[str, ...] | None = None
    layers: Layers = "all"
    insertion: Insertion | None = None
    integration: Integration | None = None

    def __init_subclass__(cls, name: str | None = None) -> None:
        super().__init_subclass__()
        cls.name = name or kebab(cls.__name__)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for option in fields(self):
            value = _plain(hints[option.name], getattr(self, option.name), f"{self.name}: {option.name}")
            object.__setattr__(self, option.name, value)
        check_options(self)

    @property
    def card(self) -> Card:
        """The published card with this instance's overrides; raises CardConflict on an impossible one."""
        changes: dict[str, Any] = {"scale": self.scale}
        if self.workspaces is not None:
            changes["workspaces"] = self.workspaces
        if self.insertion is not None:
            changes["insertion"] = self.insertion
        if self.integration is not None:
            changes["integration"] = self.integration
        if self._gates():
            changes |= self._behind_a_gate()
        card = replace(self.published, **changes)
        self._refuse_impossible(card)
        return card

    @property
    def scale(self) -> float:
        """The constant of scaled addition (alpha / rank and the like)."""
        return self.published.scale

    def build(self, site: Site) -> nn.Module:
        """The module for one site, made on the current default device, in fp32."""
        raise NotImplementedError

    def fits(self, site: Site) -> bool:
        """Whether a module can be built at a selected site; others are left out, none left is an error."""
        return True

    def omits(self, site: Site) -> bool:
        """Whether the options themselves leave out a site that the workspaces select (a rank of 0)."""
        return False

    @property
    def needs_data(self) -> bool:
        """Whether modules start from statistics of calibration data."""
        return False

    @property
    def needs_originals(self) -> bool:
        """Whether modules start from the weights as they were before quantisation; `build` finds `site.original`."""
        return False

    def gathers(self, site: Site) -> Statistic | None:
        """What calibration gathers at a site; `build` finds it filled at `site.statistic`."""
        return None

    def resolved(self, sites: Sequence[Site]) -> Technique:
        """This technique once its sites are known; differs where options are found from their statistics."""
        return self

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        """One module common to all sites (card: sharing), handed to each built module by `adopt(shared)`.

        A built module registers it as its child `shared`: its tensors are named `shared.NAME` at every site.
        """
        return None

    def tie(self, first: nn.Module, second: nn.Module) -> None:
        """Called for two modules built for one and the same host tensor (tied weights)."""
        return

    def others(self) -> tuple[str, ...]:
        """Names of attached adapters that its modules read, share tensors with or start from.

        Each built module then has `meet(theirs)`, given name -> their grafts at its site. Adapters that the stored
        technique still names cannot be detached before it.
        """
        return ()

    def stored(self) -> Technique:
        """The technique as an adapter file names it; differs where training scaffolding is dropped on saving.

        Where it differs, the built modules have `stored_tensors() -> dict[str, Tensor]`: what the file holds
        of them, under the names that the stored technique's modules use.
        """
        return self

    def update(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """(down, up) whose product up @ down is the whole change of a weight, from one site's tensors in a file.

        None where a file alone does not tell it.
        """
        return None

    def tokenized(self, encode: Callable[[str], Sequence[int]]) -> Technique:
        """The technique with the texts among its options made into token ids, where it has any."""
        return self

    def width_read(self, site: Site) -> int:
        """Channels a hidden-port module reads: the signal it changes, or the site's input when parallel."""
        return site.channels_in if self.card.insertion is Insertion.PARALLEL else site.width

    def learning_rates(self) -> Mapping[str, float]:
        """Factors on the learning rate by the last part of a tensor's name (LoRA+)."""
        return {}

    def _gates(self) -> bool:
        """Whether a gate is asked for in front of an answer that is published without one."""
        gated = Integration.GATED_ADDITION
        return self.integration is gated and self.published.integration in _ADDITIVE

    def _behind_a_gate(self) -> dict[str, Any]:
        """What a gate, which reads a row of the signal, makes of a card: no change of weights is left of it."""
        changes = {"adaptation": Adaptation.ADDITION, "linear": False, "token_wise": False}
        if self.published.port is not Port.WEIGHT:
            return changes
        return {**changes, "input": Input.HIDDEN, "insertion": Insertion.PARALLEL}

    def _refuse_impossible(self, card: Card) -> None:
        old, new = self.published, card
        if self._gates() and old.port in (Port.WEIGHT, Port.HIDDEN):
            return
        if new.port is not old.port:
            raise CardConflict(
                f"{self.name}: integration={new.integration.value} would move it from the {old.port.value} "
                f"port to the {new.port.value} port, which its module does not speak"
            )
        moved = (new.insertion, new.integration) != (old.insertion, old.integration)
        if old.port is not Port.HIDDEN and moved:
            raise CardConflict(
                f"{self.name}: insertion and integration are fixed at the {old.port.value} port "
                f"({old.insertion.value}, {old.integration.value}); only hidden-port techniques change them"
            )
        if new.integration is not old.integration and not {old.integration, new.integration} <= _ADDITIVE:
            raise CardConflict(
                f"{self.name}: its module answers for {old.integration.value}; "
                f"{new.integration.value} needs another module"
            )
        if new.integration is Integration.RESCALING and new.insertion is Insertion.PARALLEL:
            raise CardConflict(f"{self.name}: rescaling acts on the host's own signal and cannot be parallel")

    def options(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain JSON values."""
        values = {option.name: (getattr(self, option.name), default_of(option)) for option in fields(self)}
        changed = {name: value for name, (value, default) in values.items() if value != default}
        return {name: _json(value) for name, value in changed.items()}


def kebab(name: str) -> str:
    """`BottleneckAdapter` -> `bottleneck-adapter`, `LoRA` -> `lora`, `PTuning` -> `p-tuning`."""
    if re.fullmatch(r"[A-Z0-9a-z]{1,4}|[A-Z]+[a-z]?[A-Z]*[A-Z0-9]*", name):
        return name.lower()
    if re.search(r"[a-z][A-Z]{1,2}$", name):  # DeltaRA-like acronyms: one word
        return name.lower()
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


def default_of(option: Field[Any]) -> Any:
    """The default value of a dataclass field."""
    return option.default_factory() if option.default_factory is not MISSING else option.default


def from_options(kind: type[Technique], options: Mapping[str, Any]) -> Technique:
    """Build a technique from plain JSON or YAML values; unknown keys are refused with the nearest name."""
    known = {f.name for f in fields(kind)}
    for key in options:
        if key not in known:
            raise UnknownName(f"{kind.name} has no option {key!r}. {nearest(key, known)}")
    return kind(**options)


def check_options(technique: Technique) -> None:
    """Check each field against its annotation (type and range); one place for every technique."""
    hints = get_type_hints(type(technique), include_extras=True)
    for option in fields(technique):
        value = getattr(technique, option.name)
        problem = _problem(hints[option.name], value)
        if problem:
            raise BadOption(f"{technique.name}: {option.name}={value!r} {problem}")


def _json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    return value.value if isinstance(value, Enum) else value


def _plain(hint: Any, value: Any, where: str) -> Any:
    """The value as its field holds it: a list as a tuple, a lone name as a tuple of one, text as a member."""
    kinds = _alternatives(hint)
    if isinstance(value, list):
        return tuple(value)
    enums = [kind for kind in kinds if isinstance(kind, EnumMeta)]
    if not isinstance(value, str) or str in kinds or not (enums or tuple[str, ...] in kinds):
        return value
    return _member(enums[0], value, where) if enums else (value,)


def _member(enum: Any, value: str, where: str) -> Any:
    try:
        return enum(value)
    except ValueError:
        raise BadOption(f"{where}={value!r} is not one of {', '.join(m.value for m in enum)}") from None


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _problem(hint: Any, value: Any) -> str | None:
    """What is wrong with a value by its annotation, None when nothing is."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        wrong = _problem(inner[0], value)
        if wrong:
            return "; ".join([wrong, *(str(check) for check in inner[1:] if isinstance(check, Because))])
        if value is None:
            return None
        return next((text for check in inner[1:] if (text := check.check(value))), None)
    if origin in (Union, UnionType):
        problems = [_problem(kind, value) for kind in inner if kind is not NoneType]
        fine = None in problems or (value is None and NoneType in inner)
        return None if fine else " and ".join(map(str, problems))
    if origin is Literal:
        return None if value in inner else f"is not one of {', '.join(map(repr, inner))}"
    if origin is Mapping:
        return _mapping_problem(inner, value)
    if origin is tuple:
        fine = isinstance(value, tuple) and not any(_problem(inner[0], item) for item in value)
        return None if fine else f"is not a list of {_NOUNS.get(inner[0], inner[0])}"
    return _wrong_type(hint, value)


def _mapping_problem(inner: tuple[Any, ...], value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return "is not a mapping"
    pairs = ((key, _problem(inner[0], key) or _problem(inner[1], item)) for key, item in value.items())
    return next((f"{problem} at {key!r}" for key, problem in pairs if problem), None)


def _wrong_type(hint: Any, value: Any) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float:
        return None if number and math.isfinite(value) else "is not a finite number"
    if hint is int:
        return None if number and isinstance(value, int) else "is not a whole number"
    return None if isinstance(value, hint) else f"is not a {hint.__name__}"


_NOUNS = {str: "names", int: "whole numbers", float: "numbers"}
