"""From one adapter format to the other without loading a base model's weights.

graftwork -> HF PEFT needs nothing but the file: it keeps module names. Two things depend on the base's values
and are refused with the reason: biases (full there, differences here) and prefixes (positions). HF PEFT ->
graftwork needs to know which module is which workspace, and so the base's configuration: `base`, else the
configuration's `base_model_name_or_path`, built on the meta device. The base's fingerprint is then unknown;
its shapes are kept and checked when the file is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftwork.adapters.format import read_own, write_own
from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.folder import read_config, read_folder, write_folder
from graftwork.adapters.installing import base_of, task_of
from graftwork.adapters.names import as_adapter_name
from graftwork.adapters.store import FORMATS, HF_PEFT, OWN, SUFFIX, check_format_name, is_hf_peft, locate
from graftwork.errors import BadFile, BadOption

_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def convert(
    source: str | Path, target: str | Path, *, format: str, base: nn.Module | str | None = None
) -> Path:
    """Write the adapter at `source` to `target` in the other format.

    Args:
        source: a file, a folder or a run, as `load` takes it.
        target: graftwork: a file (`.safetensors` is added where missing); HF PEFT: a folder.
        format: the format to write, "graftwork" or "hf-peft".
        base: the base model or where its configuration is, when HF PEFT's folder does not tell.

    Returns:
        What was written.
    """
    check_format_name(format)
    found = locate(Path(source))
    if is_hf_peft(found) == (format == HF_PEFT):
        raise BadOption(
            f"{found} is in the format {format!r} already; choose {' or '.join(set(FORMATS) - {format})}"
        )
    if format == OWN:
        return _to_own(found, Path(target), base)
    write_folder(Path(target), read_own(found), None, None)
    return Path(target)


def _to_own(folder: Path, target: Path, base: nn.Module | str | None) -> Path:
    model = base if isinstance(base, nn.Module) else _empty_base(read_config(folder), base)
    path = target if target.suffix == SUFFIX else target.with_name(target.name + SUFFIX)
    stored = read_folder(folder, model, as_adapter_name(path.stem), base_of(model), task_of(model))
    write_own(path, stored)
    return path


def _empty_base(config: Config, base: str | None) -> nn.Module:
    """The base's architecture on the meta device; remote code is never run."""
    import transformers

    named = base or config.get("base_model_name_or_path", str, "")
    if not named:
        raise BadFile(
            f"{config.where} does not name its base model, whose configuration is needed; pass base="
        )
    try:
        wanted = transformers.AutoConfig.from_pretrained(named, trust_remote_code=False)
        with torch.device("meta"):
            return _class_for(config.task, wanted)(wanted)
    except (OSError, ValueError) as error:
        raise BadFile(
            f"the configuration of the base {named!r} cannot be read ({str(error)[:200]}); pass base=, a "
            "model or a folder with config.json"
        ) from None


def _class_for(task: str | None, wanted: Any) -> Callable[[Any], nn.Module]:
    """The class of the task type, else the one that the base's configuration names, else the bare model."""
    import transformers

    named = getattr(transformers, (wanted.architectures or [""])[0], None)
    if task not in _AUTO and isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    return getattr(transformers, _AUTO.get(task or "", "AutoModel")).from_config
