"""Contexts: one adapter for each domain of tokens, as a recipe spells them (Context-PEFT, arXiv:2312.08900).

technique: {name: lora, rank: 4}
contexts:
  image: <image>                                            # tokens; the technique is the recipe's
  text: {tokens: others, technique: {name: lora, rank: 8}}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from graftwork.adapters.names import check_file_name
from graftwork.errors import BadOption
from graftwork.reference.catalogue import make
from graftwork.reference.properties import Port
from graftwork.reference.technique import Technique
from graftwork.training.section import Named, Section, Techniques

OTHERS = "others"
Token = str | int


def _tokens(value: Any) -> Any:
    """The tokens as a list, or `others`."""
    if value == OTHERS:
        return value
    given = value if isinstance(value, list) else [value]
    if not given:
        raise ValueError(f"name a token, or {OTHERS}")
    for token in given:
        if isinstance(token, bool) or not isinstance(token, str | int) or token in ("", OTHERS):
            raise ValueError(
                f"{token!r} is no token: write a token as the tokenizer spells it, its number, or a list of them; "
                f"{OTHERS} stands alone"
            )
    _refuse_twice(given)
    return given


class Context(Section):
    """One adapter and the tokens it serves.

    Args:
        tokens: as the tokenizer spells them, or their numbers; `<image>` stands where an image's rows do; `others` are
            all that no context lists.
        technique: one or several; by default the recipe's.
    """

    tokens: Annotated[list[Token] | str, BeforeValidator(_tokens)]
    technique: Techniques | None = None

    @property
    def listed(self) -> list[Token]:
        """The tokens it names; none where it takes the others."""
        return self.tokens if isinstance(self.tokens, list) else []


def _short(value: Any) -> Any:
    return value if isinstance(value, Mapping | Context) else {"tokens": value}


def _distinct(contexts: dict[str, Context]) -> dict[str, Context]:
    if not contexts:
        raise ValueError("name at least one, or leave the key out")
    _check_names(contexts)
    if sum(context.tokens == OTHERS for context in contexts.values()) > 1:
        raise ValueError(f"several take {OTHERS}; one context can")
    _refuse_twice([token for context in contexts.values() for token in context.listed])
    return contexts


Contexts = Annotated[
    dict[str, Annotated[Context, BeforeValidator(_short)]],
    AfterValidator(_distinct),
]


def techniques_of(context: Context, common: list[Named] | None) -> list[Technique]:
    """What a context attaches: its own, or the recipe's."""
    return [make(spec.name, spec.options) for spec in context.technique or common or []]


def check_techniques(contexts: Mapping[str, Context], common: list[Named] | None) -> None:
    """ValueError where a context has no technique, or one that cannot serve single tokens, or nobody takes `common`."""
    if common is not None and all(context.technique for context in contexts.values()):
        raise ValueError("technique: every context has one of its own, so it would not be used; leave it out")
    for name, context in contexts.items():
        techniques = techniques_of(context, common)
        if not techniques:
            raise ValueError(f"contexts.{name}.technique: missing, and the recipe has none for all contexts")
        for technique in techniques:
            _check_token_wise(name, technique)


def _check_token_wise(name: str, technique: Technique) -> None:
    card = technique.card
    if not card.token_wise or card.port not in (Port.WEIGHT, Port.HIDDEN):
        raise ValueError(
            f"contexts.{name}: {technique.name} does not treat tokens one by one, so it cannot serve some of them; "
            "take one that does (`graftwork techniques NAME` says which: routes per token)"
        )


def _check_names(names: Mapping[str, Any]) -> None:
    for name in names:
        try:
            check_file_name(name)
        except BadOption as error:
            raise ValueError(str(error)) from None
    folded = Counter(name.casefold() for name in names)
    same = [name for name in names if folded[name.casefold()] > 1]
    if same:
        raise ValueError(f"{' and '.join(same)} would be one file where case does not count; rename one")


def _refuse_twice(tokens: list[Token]) -> None:
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is listed twice; a token belongs to one context")
