"""YAML as recipes use it: `1e-3` is a number, and only `true` and `false` are booleans (YAML 1.2)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from graftwork.errors import BadRecipe


class _Loader(yaml.SafeLoader):
    """SafeLoader with the number and boolean rules of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if not tag.endswith((":float", ":bool", ":timestamp"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|false", re.I), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)"),
    list("-+.0123456789"),
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = {str(key) for key in keys if keys.count(key) > 1}
    if twice:
        raise BadRecipe(f"line {node.start_mark.line + 1}: {', '.join(sorted(twice))} is given twice")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def parse(text: str, origin: str) -> Any:
    """The value that `text` spells; raises BadRecipe with `origin` and the line of a syntax error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}, line {mark.line + 1}" if mark else origin
        raise BadRecipe(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except BadRecipe as error:
        raise BadRecipe(f"{origin}, {error}") from None


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecipe(f"cannot read the recipe {path}: {error}") from None
    value = parse(text, str(path))
    if not isinstance(value, dict):
        raise BadRecipe(
            f"{path}: a recipe is a mapping with the keys model, technique, task, data, training, output"
        )
    return value


def dump(value: dict[str, Any]) -> str:
    """YAML text in the order of the mapping."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
