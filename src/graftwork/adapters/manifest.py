"""What an adapter file says of itself, as data and as JSON.

Only options that differ from their defaults are written, with the card they led to. When a later version of a
technique means something else by the same options, its card differs from the stored one and reading stops
there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

from torch import nn

from graftwork.adapters.base import BaseIdentity, class_name, read_identity
from graftwork.adapters.documents import take, take_list
from graftwork.errors import BadFile, GraftworkError
from graftwork.reference.card import Card
from graftwork.reference.catalogue import make, technique_class
from graftwork.reference.site import Site
from graftwork.reference.technique import Technique

FORMAT = 1
_DOCUMENTATION = {"formula", "parameters", "citation", "workspaces"}


@dataclass(frozen=True)
class Owner:
    """Whose a tensor is: technique by index, site key, and its own name there (`shared.NAME` when common)."""

    technique: int
    key: str
    name: str


@dataclass(frozen=True)
class Place:
    """Where a site was in the model that the adapter was trained on, for converters and people.

    When a file is loaded sites are found by their keys, never by these.

    Attributes:
        module, host: dotted name of the host module and its class.
        parameter, side, kind, stack, layer, kernel, channels, fused_width, width_in, width_out, heads: as in `Site`.
    """

    module: str
    host: str
    parameter: str
    side: str
    kind: str
    stack: str = ""
    layer: int | None = None
    kernel: tuple[int, ...] = ()
    channels: tuple[int, ...] | None = None
    fused_width: int = 0
    width_in: int = 0
    width_out: int = 0
    heads: int = 0

    @classmethod
    def of(cls, site: Site, host: str) -> Place:
        """The part of a site that a file keeps."""
        same = {f.name: getattr(site, f.name) for f in fields(cls) if f.name not in ("host", "side", "kind")}
        return cls(host=host, side=site.side.value, kind=site.kind.value, **same)

    def document(self) -> dict[str, Any]:
        """As plain JSON, defaults left out."""
        return {f.name: _plain(v) for f in fields(self) if (v := getattr(self, f.name)) != f.default}


def place_of(model: nn.Module, site: Site) -> Place:
    """Where a site of `model` is."""
    return Place.of(site, class_name(model.get_submodule(site.module)))


@dataclass(frozen=True)
class Manifest:
    """Everything in an adapter file but its tensors.

    Attributes:
        name: the adapter's name when it was saved.
        techniques: in the adapter's order.
        sites: site key -> where it was.
        tensors: tensor name -> whose it is.
        base: the base it was trained on.
        task: what the model was for (`SequenceClassification`), empty when it had no task.
        labels: names of the head's classes by number, empty without a head.
        written_by: version of graftwork.
    """

    name: str
    techniques: tuple[Technique, ...]
    sites: Mapping[str, Place]
    tensors: Mapping[str, Owner]
    base: BaseIdentity
    task: str = ""
    labels: Mapping[int, str] | None = None
    written_by: str = ""

    def document(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "format": FORMAT,
            "graftwork": self.written_by or version("graftwork"),
            "name": self.name,
            "techniques": [
                {"name": t.name, "options": t.options(), "card": card_document(t.card)}
                for t in self.techniques
            ],
            "sites": {key: place.document() for key, place in self.sites.items()},
            "tensors": {name: [o.technique, o.key, o.name] for name, o in self.tensors.items()},
            "base": self.base.document(),
            "task": self.task,
            "labels": {str(number): label for number, label in (self.labels or {}).items()},
        }


def read_manifest(document: Mapping[str, Any], where: str) -> Manifest:
    """From plain JSON. Raises BadFile where it is incomplete, of a later format or beyond this version."""
    check_format(document, where)
    techniques = tuple(
        _read_technique(entry, where) for entry in take_list(document, "techniques", dict, where)
    )
    return Manifest(
        take(document, "name", str, where),
        techniques,
        {key: _read_place(entry, where) for key, entry in take(document, "sites", dict, where).items()},
        _read_owners(take(document, "tensors", dict, where), len(techniques), where),
        read_identity(take(document, "base", dict, where), f"{where}: base"),
        take(document, "task", str, where),
        _read_labels(take(document, "labels", dict, where), where),
        take(document, "graftwork", str, where),
    )


def check_format(document: Mapping[str, Any], where: str) -> None:
    """Refuse a format that this version does not know."""
    number = take(document, "format", int, where)
    if number != FORMAT:
        writer = document.get("graftwork", "unknown")
        raise BadFile(
            f"{where}: file format {number}, written by graftwork {writer}; this version reads "
            f"format {FORMAT}. Upgrade graftwork"
        )


def card_document(card: Card) -> dict[str, Any]:
    """A card as plain JSON (enumerations by their values)."""
    return {f.name: _plain(getattr(card, f.name)) for f in fields(card)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else getattr(value, "value", value)


def _read_technique(entry: Mapping[str, Any], where: str) -> Technique:
    name = take(entry, "name", str, where)
    options = take(entry, "options", dict, where)
    try:
        technique = make(name, without_neutral_strangers(name, options))
        card = card_document(technique.card)
    except (GraftworkError, TypeError) as error:
        raise BadFile(f"{where}: technique {name!r} cannot be rebuilt: {error}") from None
    _compare_cards(name, take(entry, "card", dict, where), card, where)
    return technique


def without_neutral_strangers(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those that this version does not know and that say nothing (None, False, empty)."""
    known = {f.name for f in fields(technique_class(name))}
    return {key: value for key, value in options.items() if key in known or not is_neutral(value)}


def is_neutral(value: object) -> bool:
    """Whether an unknown option with this value can be left out: nothing was asked for."""
    return value is None or value is False or value in ("", [], {})


def _compare_cards(name: str, stored: Mapping[str, Any], card: Mapping[str, Any], where: str) -> None:
    compared = stored.keys() & card.keys() - _DOCUMENTATION
    apart = sorted(key for key in compared if stored[key] != card[key])
    if apart:
        words = ", ".join(f"{key} was {stored[key]}, is {card[key]}" for key in apart)
        raise BadFile(
            f"{where}: technique {name!r} of this version is not the one that was trained ({words}); "
            "use the version of graftwork that wrote the file"
        )


def _read_place(entry: object, where: str) -> Place:
    if not isinstance(entry, dict):
        raise BadFile(f"{where}: a site is a {type(entry).__name__}, expected a JSON object")
    there = f"{where}: sites"
    names = {key: take(entry, key, str, there) for key in ("module", "host", "parameter", "side", "kind")}
    numbers = {
        key: take(entry, key, int, there)
        for key in ("layer", "fused_width", "width_in", "width_out", "heads")
        if key in entry
    }
    lists = {key: tuple(take_list(entry, key, int, there)) for key in ("kernel", "channels") if key in entry}
    return Place(**names, stack=str(entry.get("stack", "")), **numbers, **lists)  # type: ignore[arg-type]


def _read_owners(entries: Mapping[str, Any], techniques: int, where: str) -> dict[str, Owner]:
    owners = {}
    for tensor, entry in entries.items():
        if not (isinstance(entry, list) and [type(part) for part in entry] == [int, str, str]):
            raise BadFile(f"{where}: the manifest entry of {tensor!r} is not [technique, site, name]")
        if not 0 <= entry[0] < techniques:
            raise BadFile(f"{where}: {tensor!r} belongs to technique {entry[0]} of {techniques}")
        owners[tensor] = Owner(*entry)
    return owners


def _read_labels(entries: Mapping[str, Any], where: str) -> dict[int, str]:
    try:
        return {int(number): str(label) for number, label in entries.items()}
    except ValueError:
        raise BadFile(f"{where}: a label's number is not a number") from None
