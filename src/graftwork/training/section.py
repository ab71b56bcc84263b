"""What parts of a recipe are made of: strict sections, and things by name with their options beside the name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from graftwork.errors import GraftworkError
from graftwork.reference.catalogue import make


class Section(BaseModel):
    """A part of a recipe: strict types, no unknown keys, no change after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Named(BaseModel):
    """Something by name, with its options beside the name; what it names checks each of them."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        return self.model_extra or {}


def named(value: Any) -> Any:
    """`lora` stands for `{name: lora}`."""
    return {"name": value} if isinstance(value, str) else value


def listed(value: Any) -> Any:
    """One stands for a list of one."""
    return value if isinstance(value, list) else [value]


def checked(check: Callable[[str, Mapping[str, Any]], object]) -> AfterValidator:
    """Let `check` look at name and options; what it raises becomes a finding of pydantic's."""

    def look(spec: Named) -> Named:
        try:
            check(spec.name, spec.options)
        except GraftworkError as error:
            raise ValueError(str(error)) from None
        return spec

    return AfterValidator(look)


OneTechnique = Annotated[Named, BeforeValidator(named), checked(make)]
Techniques = Annotated[list[OneTechnique], BeforeValidator(listed), Field(min_length=1)]
