"""Which modules an HF PEFT configuration means. Rules in https://huggingface.co/docs/peft, read from version
0.21.

A list entry matches a path that equals it (then in any layer) or ends with a dot and it; a string is a
regular expression for the whole path; pattern keys (`rank_pattern`) are regular expressions anchored at the
end of the path; `modules_to_save` are plain endings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from graftwork.adapters.hf_peft.config import Config
from graftwork.errors import BadFile

EVERY_LINEAR = "all-linear"
LONGEST_PATTERN = 2000

_NESTED = re.compile(r"\([^()]*[*+}][^()]*\)[*+{]")


def targeted(config: Config, paths: Iterable[str]) -> list[str] | None:
    """The paths that `target_modules` and its companions mean, None where the configuration does not say.

    Args:
        paths: dotted names of all modules of the model.
    """
    targets = config.document.get("target_modules")
    if targets is None or targets == EVERY_LINEAR:
        return None
    chosen = Chooser(targets, config)
    excluded = Chooser(config.document.get("exclude_modules") or [], config)
    saved = [re.escape(name) for name in config.saved_modules()]
    inside = re.compile(rf"(^|.*\.)({'|'.join(saved)})($|\..*)") if saved else None
    in_layers = None if isinstance(targets, str) else _layers(config)
    return [
        path
        for path in paths
        if chosen.takes(path)
        and not excluded.takes(path)
        and not (inside and inside.match(path))
        and not (in_layers and path not in chosen.endings and _layer(path, config) not in in_layers)
    ]


class Chooser:
    """Matches paths against a list of endings or one regular expression."""

    def __init__(self, wanted: object, config: Config) -> None:
        self.whole: re.Pattern[str] | None = None
        self.endings: tuple[str, ...] = ()
        if isinstance(wanted, str):
            self.whole = safe_pattern(wanted, config.where)
        elif isinstance(wanted, list) and all(isinstance(entry, str) for entry in wanted):
            self.endings = tuple(wanted)
        else:
            raise BadFile(f"{config.where}: modules must be a list of names or one pattern, not {wanted!r}")

    def takes(self, path: str) -> bool:
        """Whether the path is meant."""
        if self.whole is not None:
            return self.whole.fullmatch(path) is not None
        return any(path == ending or path.endswith(f".{ending}") for ending in self.endings)


def by_pattern(patterns: Mapping[str, float], path: str, default: float, where: str) -> float:
    """The value of the first pattern whose key matches the end of the path."""
    for key, value in patterns.items():
        if safe_pattern(rf"(.*\.)?({key})$", where).match(path):
            return value
    return default


def safe_pattern(text: str, where: str) -> re.Pattern[str]:
    """A compiled pattern. Refuses broken ones and those that can take for ever (a repeat inside a repeat)."""
    if len(text) > LONGEST_PATTERN or _NESTED.search(text):
        raise BadFile(f"{where}: the pattern {text[:80]!r} is too long or repeats a repetition")
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise BadFile(f"{where}: the pattern {text[:80]!r} is broken ({error})") from None


def _layers(config: Config) -> set[int] | None:
    wanted = config.document.get("layers_to_transform")
    if wanted is None or wanted == []:
        return None
    numbers = wanted if isinstance(wanted, list) else [wanted]
    if not all(isinstance(number, int) for number in numbers):
        raise BadFile(f"{config.where}: layers_to_transform={wanted!r} is not a list of layer numbers")
    return set(numbers)


def _layer(path: str, config: Config) -> int | None:
    """The layer a path lies in: the first number behind a name (or behind one of `layers_pattern`)."""
    names = config.names("layers_pattern")
    patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in names] or [r".*?\.[^.]*\.(\d+)\."]
    for pattern in patterns:
        match = safe_pattern(pattern, config.where).match(path)
        if match:
            return int(match[1])
    return None


def exact(path: str) -> str:
    """A pattern that takes one path."""
    return f"^{re.escape(path)}"
