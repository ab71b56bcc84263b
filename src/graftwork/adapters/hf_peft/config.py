"""HF PEFT's `adapter_config.json`: every field is understood, known not to matter, or a reason to stop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from graftwork.adapters.documents import take
from graftwork.adapters.manifest import is_neutral
from graftwork.errors import BadFile

T = TypeVar("T")

COMMON = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "peft_version",
        "runtime_config",
    }
)
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that a task type saves without being asked to."""

TASKS = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
    "CausalLM": "CAUSAL_LM",
    "ConditionalGeneration": "SEQ_2_SEQ_LM",
    "": "FEATURE_EXTRACTION",
}
"""Task as in `Manifest.task` -> HF PEFT's task type."""


class Config:
    """A configuration with typed access; errors name the file."""

    def __init__(self, document: Mapping[str, Any], where: str) -> None:
        self.document = document
        self.where = where

    def check(
        self,
        understood: Iterable[str],
        indifferent: Iterable[str] = (),
        refused: Mapping[str, str] | None = None,
    ) -> None:
        """Stop at any field that asks for something that would not be done.

        Args:
            understood: fields whose values are used.
            indifferent: fields that change nothing for a trained adapter.
            refused: field -> why a value other than a neutral one cannot be honoured.
        """
        known = COMMON | set(understood) | set(indifferent)
        for name, value in self.document.items():
            if name not in known and not is_neutral(value):
                reason = (refused or {}).get(name, "this version of graftwork does not know the field")
                raise BadFile(f"{self.where}: {name}={value!r} cannot be honoured: {reason}")

    def get(self, name: str, kind: type[T], default: T) -> T:
        """A field's value, `default` where it is absent or null."""
        return default if self.document.get(name) is None else take(self.document, name, kind, self.where)

    def number(self, name: str, default: float) -> float:
        """A number, whole or not."""
        value = self.document.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadFile(f"{self.where}: {name}={value!r} is not a number")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """A list of names; a single name counts as a list of one."""
        value = self.document.get(name)
        found = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
            raise BadFile(f"{self.where}: {name}={value!r} is not a list of names")
        return tuple(found)

    def patterns(self, name: str) -> dict[str, float]:
        """A mapping of module patterns to numbers."""
        value = self.get(name, dict, {})
        if not all(
            isinstance(entry, int | float) and not isinstance(entry, bool) for entry in value.values()
        ):
            raise BadFile(f"{self.where}: {name} must give a number for each pattern")
        return value

    @property
    def task(self) -> str | None:
        """The task type, None where there is none."""
        return self.get("task_type", str, "") or None

    def saved_modules(self) -> tuple[str, ...]:
        """`modules_to_save` together with the heads that the task type implies."""
        return tuple(dict.fromkeys((*self.names("modules_to_save"), *HEADS.get(self.task or "", ()))))
